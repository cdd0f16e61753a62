#include "token_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "crc32c.h"

namespace llamahome {
namespace {

// Sizes below 2^62 are checked first, so rounding up cannot overflow.
constexpr std::uint64_t align(std::uint64_t value) { return (value + 63) / 64 * 64; }

constexpr std::uint64_t kChunk = std::uint64_t{1} << 16;

constexpr std::uint64_t num_blocks(const Header& h) { return (h.checksums_at - kPage + kPage - 1) / kPage; }

constexpr std::uint64_t num_starts(const Header& h) { return (h.num_tokens * h.token_width + kPage - 1) / kPage; }

}  // namespace

TokenFile::TokenFile(std::string path, ReadMode mode) : path_(std::move(path)) {
  try {
    open_and_map(mode);
  } catch (...) {  // a constructor that throws has no destructor call
    close();
    throw;
  }
}

TokenFile::~TokenFile() { close(); }

void TokenFile::close() noexcept {
  if (map_ != nullptr) ::munmap(map_, header_.file_size);
  if (fd_ >= 0) ::close(fd_);
}

void TokenFile::open_and_map(ReadMode mode) {
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd_ < 0) failed("cannot open");
  struct stat status{};
  if (::fstat(fd_, &status) != 0) failed("cannot read the size of");
  if (!S_ISREG(status.st_mode)) damaged("not a regular file", 0);
  check_header(static_cast<std::uint64_t>(status.st_size));
  if (mode == ReadMode::kMap) {
    void* map = ::mmap(nullptr, header_.file_size, PROT_READ, MAP_SHARED, fd_, 0);
    if (map == MAP_FAILED) failed("cannot map");
    map_ = static_cast<std::byte*>(map);
    // Documents are read in random order: the kernel's guess of what comes next would read many times too much.
    ::madvise(map_, header_.file_size, MADV_RANDOM);
  }
#if defined(POSIX_FADV_RANDOM)
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
#endif
  check_checksums();
  checked_ = std::make_unique<std::atomic<std::uint64_t>[]>(num_blocks(header_) / 64 + 1);
  asked_ = std::make_unique<std::atomic<std::uint64_t>[]>(header_.file_size / kChunk / 64 + 1);
}

void TokenFile::check_header(std::uint64_t file_size) {
  if (file_size < kPage) damaged("the file is shorter than its header", file_size);
  std::byte page[kPage];
  read_exactly(page, kPage, 0);
  std::memcpy(&header_, page, sizeof header_);
  std::memcpy(&header_crc_, page + kPage - 4, 4);
  const Header& h = header_;
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) damaged("not a token file: the first bytes are wrong", 0);
  if (crc32c(page, kPage - 4) != header_crc_) damaged("the header's checksum is wrong", kPage - 4);
  if (h.version != kVersion) damaged("version " + std::to_string(h.version) + " of the format is not known", 8);
  if (h.token_width != 2 && h.token_width != 4) damaged("the token width is neither 2 nor 4", 12);
  if (file_size != h.file_size)
    damaged("the file has " + std::to_string(file_size) + " bytes, its header says " + std::to_string(h.file_size),
            std::min(file_size, h.file_size));
  // Each count is below the file's size, so the products below cannot overflow.
  if (file_size > kMaxFileSize || h.num_documents >= UINT32_MAX || h.num_documents > h.num_tokens ||
      h.num_trained > h.num_tokens || h.num_tokens > file_size || h.num_runs > file_size)
    damaged("the header's counts are impossible", 16);
  const std::uint64_t documents_at = align(kPage + h.num_tokens * h.token_width);
  const std::uint64_t runs_at = align(documents_at + (h.num_documents + 1) * sizeof(DocumentRecord));
  const std::uint64_t starts_at = align(runs_at + h.num_runs * sizeof(Run));
  const std::uint64_t checksums_at = align(starts_at + num_starts(h) * sizeof(std::uint32_t));
  if (h.documents_at != documents_at || h.runs_at != runs_at || h.starts_at != starts_at ||
      h.checksums_at != checksums_at || h.file_size != checksums_at + num_blocks(h) * sizeof(std::uint32_t))
    damaged("the header's sections do not fit its counts", 48);
}

void TokenFile::check_checksums() const {
  std::uint64_t at = header_.checksums_at;
  std::uint32_t crc = 0;
  will_need(at, header_.file_size - at);
  if (map_ != nullptr) {
    crc = crc32c(map_ + at, header_.file_size - at);
  } else {
    Scratch part(std::uint64_t{1} << 18);
    for (std::uint64_t size; at < header_.file_size; at += size) {
      size = std::min<std::uint64_t>(part.size(), header_.file_size - at);
      read_exactly(part.data(), size, at);
      crc = crc32c(part.data(), size, crc);
    }
  }
  if (crc != header_.checksums_crc) damaged("the table of checksums is damaged", header_.checksums_at);
}

std::uint64_t TokenFile::block_size(std::uint64_t block) const {
  return std::min(kPage, header_.checksums_at - (block + 1) * kPage);
}

std::uint32_t TokenFile::checksum(std::uint64_t block) const {
  const std::uint64_t at = header_.checksums_at + block * sizeof(std::uint32_t);
  std::uint32_t value;
  if (map_ != nullptr)
    std::memcpy(&value, map_ + at, sizeof value);
  else
    read_exactly(&value, sizeof value, at);
  return value;
}

void TokenFile::check_block(std::uint64_t block, const std::byte* data) const {
  if (crc32c(data, block_size(block)) != checksum(block))
    damaged("the checksum of a block is wrong", (block + 1) * kPage);
  checked_[block / 64].fetch_or(std::uint64_t{1} << (block % 64), std::memory_order_relaxed);
}

const std::byte* TokenFile::read(std::uint64_t offset, std::uint64_t size, Scratch& scratch) const {
  if (size == 0) return scratch.data();
  const std::uint64_t first = offset / kPage - 1, last = (offset + size - 1) / kPage - 1;
  bool checked = true;
  for (std::uint64_t block = first; block <= last && checked; ++block) checked = is_checked(block);
  if (checked) {
    if (scratch.size() < size) scratch.resize(size);
    read_exactly(scratch.data(), size, offset);
    return scratch.data();
  }
  // A block is checked as a whole, so whole blocks are read.
  const std::uint64_t begin = (first + 1) * kPage, end = (last + 1) * kPage + block_size(last);
  if (scratch.size() < end - begin) scratch.resize(end - begin);
  read_exactly(scratch.data(), end - begin, begin);
  for (std::uint64_t block = first; block <= last; ++block)
    if (!is_checked(block)) check_block(block, scratch.data() + (block - first) * kPage);
  return scratch.data() + (offset - begin);
}

void TokenFile::read_exactly(void* out, std::uint64_t size, std::uint64_t offset) const {
  auto* to = static_cast<char*>(out);
  while (size > 0) {
    const ssize_t got = ::pread(fd_, to, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) failed("cannot read");
    if (got == 0) damaged("the file ends too early: it was truncated", offset);
    to += got;
    offset += static_cast<std::uint64_t>(got);
    size -= static_cast<std::uint64_t>(got);
  }
}

void TokenFile::check_size() const {
  if (map_ == nullptr) return;  // pread tells by itself
  struct stat status{};
  if (::fstat(fd_, &status) != 0) failed("cannot read the size of");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < header_.file_size) damaged("the file was truncated while it was being read", size);
}

Document TokenFile::document(std::uint64_t index, Scratch& scratch) const {
  if (index >= header_.num_documents) throw std::out_of_range("document index out of range");
  const std::uint64_t at = header_.documents_at + index * sizeof(DocumentRecord);
  DocumentRecord pair[2];
  std::memcpy(pair, bytes(at, sizeof pair, scratch), sizeof pair);
  const auto& [here, next] = pair;
  const std::uint64_t length = next.token - here.token, num_runs = next.run - here.run;
  // The copies are checked, not the file: it may change under a mapping.
  if (here.token >= next.token || next.token > header_.num_tokens || length > UINT32_MAX || here.run > next.run ||
      next.run > header_.num_runs || num_runs > length || here.trained > length)
    damaged("the record of document " + std::to_string(index) + " is impossible", at);
  return {here.token,  here.run, here.source, static_cast<std::uint32_t>(length), static_cast<std::uint32_t>(num_runs),
          here.trained};
}

std::uint32_t TokenFile::peek_document_at(std::uint64_t token, Scratch& scratch) const {
  if (token >= header_.num_tokens) throw std::out_of_range("token index out of range");
  std::uint32_t index;
  std::memcpy(&index, bytes(start_at(token), sizeof index, scratch), sizeof index);
  if (index >= header_.num_documents) damaged("the first document of a block does not exist", start_at(token));
  return index;
}

std::uint32_t TokenFile::document_at(std::uint64_t token, Scratch& scratch) const {
  const std::uint32_t index = peek_document_at(token, scratch);
  if (document(index, scratch).token > token) damaged("the first document of a block is wrong", start_at(token));
  return index;
}

const Run* TokenFile::runs(const Document& document, std::uint64_t index, Scratch& scratch) const {
  const std::uint64_t at = header_.runs_at + document.run * sizeof(Run);
  const auto* runs = reinterpret_cast<const Run*>(bytes(at, document.num_runs * sizeof(Run), scratch));
  std::uint64_t trained = 0, end = 0;
  for (std::uint32_t i = 0; i < document.num_runs; ++i) {
    if (runs[i].begin <= end || runs[i].begin >= runs[i].end || runs[i].end > document.length)
      damaged("the trained runs of document " + std::to_string(index) + " are impossible", at);
    end = runs[i].end;
    trained += end - runs[i].begin;
  }
  if (trained != document.trained)
    damaged("the trained runs of document " + std::to_string(index) + " do not add up", at);
  return runs;
}

void TokenFile::prefetch_record(std::uint64_t index) const {
  if (map_ == nullptr) return;
  const std::byte* record = map_ + header_.documents_at + index * sizeof(DocumentRecord);
  __builtin_prefetch(record);
  __builtin_prefetch(record + sizeof(DocumentRecord));
}

void TokenFile::prefetch_start(std::uint64_t token) const {
  if (map_ != nullptr) __builtin_prefetch(map_ + start_at(token));
}

// Not checked yet, but good enough for a hint.
std::uint32_t TokenFile::peek_start(std::uint64_t token) const {
  std::uint32_t index;
  std::memcpy(&index, map_ + start_at(token), sizeof index);
  return std::min(index, static_cast<std::uint32_t>(header_.num_documents));
}

void TokenFile::prefetch_record_at(std::uint64_t token) const {
  if (map_ != nullptr) prefetch_record(peek_start(token));
}

void TokenFile::prefetch_runs_at(std::uint64_t token) const {
  if (map_ == nullptr) return;
  DocumentRecord record;
  std::memcpy(&record, map_ + header_.documents_at + peek_start(token) * sizeof record, sizeof record);
  prefetch_runs(record.run);
}

void TokenFile::prefetch_runs(std::uint64_t run) const {
  // A record that is not checked yet may hold any number; a pointer past the mapping would be undefined by itself.
  run = std::min(run, header_.num_runs);
  if (map_ != nullptr) __builtin_prefetch(map_ + header_.runs_at + run * sizeof(Run));
}

void TokenFile::prefetch_tokens(std::uint64_t first, std::uint64_t count) const {
  if (map_ == nullptr) return;
  const std::byte* tokens = map_ + kPage + first * header_.token_width;
  const std::uint64_t size = std::min<std::uint64_t>(count * header_.token_width, 256);  // the rest is a stream
  for (std::uint64_t at = 0; at < size; at += 64) __builtin_prefetch(tokens + at);
}

void TokenFile::will_need(std::uint64_t offset, std::uint64_t size) const noexcept {
  const std::uint64_t begin = offset / kPage * kPage, end = std::min(offset + size, header_.file_size);
  if (begin >= end) return;
  if (map_ != nullptr) {
    static const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::uint64_t aligned = begin / page * page;
    ::madvise(map_ + aligned, end - aligned, MADV_WILLNEED);
  } else {
#if defined(POSIX_FADV_WILLNEED)
    ::posix_fadvise(fd_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_WILLNEED);
#endif
  }
}

void TokenFile::will_need_chunk(std::uint64_t offset) const noexcept {
  const std::uint64_t chunk = offset / kChunk, bit = std::uint64_t{1} << (chunk % 64);
  std::atomic<std::uint64_t>& word = asked_[chunk / 64];
  if ((word.load(std::memory_order_relaxed) & bit) == 0 && (word.fetch_or(bit) & bit) == 0)
    will_need(chunk * kChunk, kChunk);
}

void TokenFile::will_need_record(std::uint64_t index) const noexcept {
  will_need_chunk(header_.documents_at + index * sizeof(DocumentRecord));
}

void TokenFile::will_need_start(std::uint64_t token) const noexcept { will_need_chunk(start_at(token)); }

void TokenFile::will_need_runs(const Document& document) const noexcept {
  if (document.num_runs > 0) will_need_chunk(header_.runs_at + document.run * sizeof(Run));
}

bool TokenFile::resident(std::uint64_t offset) const noexcept {
#if defined(RWF_NOWAIT)
  char byte;
  const iovec to{&byte, 1};
  return !(::preadv2(fd_, &to, 1, static_cast<off_t>(offset), RWF_NOWAIT) < 0 && errno == EAGAIN);
#else
  (void)offset;
  return true;
#endif
}

void TokenFile::verify() const {
  check_size();
  verify_tokens();
  verify_documents();
  verify_starts();
}

void TokenFile::verify_tokens() const {
  Scratch scratch;
  constexpr std::uint64_t kPart = std::uint64_t{1} << 18;  // divides into whole blocks for both widths
  std::uint32_t largest = 0;
  for (std::uint64_t first = 0; first < header_.num_tokens; first += kPart) {
    const std::uint64_t count = std::min(kPart, header_.num_tokens - first);
    will_need(kPage + (first + count) * header_.token_width, kPart * header_.token_width);
    const std::byte* data = tokens(first, count, scratch);
    if (header_.token_width == 2) {
      const auto* ids = reinterpret_cast<const std::uint16_t*>(data);
      largest = std::max<std::uint32_t>(largest, *std::max_element(ids, ids + count));
    } else {
      const auto* ids = reinterpret_cast<const std::uint32_t*>(data);
      largest = std::max(largest, *std::max_element(ids, ids + count));
    }
  }
  if (largest != header_.max_token) damaged("the largest token id is not the header's", kPage);
}

void TokenFile::verify_documents() const {
  Scratch scratch, run_scratch;
  std::uint64_t token = 0, run = 0, trained = 0;
  for (std::uint64_t i = 0; i < header_.num_documents; ++i) {
    const Document d = document(i, scratch);
    if (d.token != token || d.run != run)
      damaged("documents do not follow each other", header_.documents_at + i * sizeof(DocumentRecord));
    runs(d, i, run_scratch);
    token += d.length;
    run += d.num_runs;
    trained += d.trained;
  }
  if (token != header_.num_tokens || run != header_.num_runs || trained != header_.num_trained)
    damaged("the header's counts are not those of the documents", 16);
}

void TokenFile::verify_starts() const {
  Scratch scratch;
  const std::uint64_t step = kPage / header_.token_width;
  for (std::uint64_t token = 0; token < header_.num_tokens; token += step) {
    const Document d = document(document_at(token, scratch), scratch);
    if (token >= d.token + d.length) damaged("the first document of a block is wrong", start_at(token));
  }
  // What lies between the sections is read by nobody; checking it here leaves no byte of the file unchecked.
  for (std::uint64_t block = 0; block < num_blocks(header_); ++block)
    bytes((block + 1) * kPage, block_size(block), scratch);
}

void TokenFile::damaged(const std::string& what, std::uint64_t offset) const { throw DamagedFile(what, path_, offset); }

void TokenFile::failed(const char* what) const {
  throw std::filesystem::filesystem_error(what, path_, std::error_code(errno, std::generic_category()));
}

}  // namespace llamahome
