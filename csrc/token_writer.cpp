#include "token_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>

#include "crc32c.h"

namespace llamahome {
namespace {

constexpr std::uint64_t kBuffer = std::uint64_t{1} << 20;  // a whole number of blocks

}  // namespace

TokenFileWriter::TokenFileWriter(std::string path, std::uint32_t token_width)
    : path_(std::move(path)), buffer_(kBuffer) {
  if (token_width != 2 && token_width != 4) throw std::invalid_argument("token width is neither 2 nor 4");
  std::memcpy(header_.magic, kMagic, sizeof kMagic);
  header_.version = kVersion;
  header_.token_width = token_width;
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) failed("cannot create");
}

TokenFileWriter::~TokenFileWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void TokenFileWriter::append(std::span<const std::uint32_t> ids, std::span<const bool> trained, std::uint64_t source) {
  if (fd_ < 0) throw std::logic_error("the file is finished");
  if (ids.empty() || ids.size() > UINT32_MAX || ids.size() != trained.size())
    throw std::invalid_argument("a document needs 1 to 2^32 - 1 tokens and as many trained marks");
  if (header_.num_documents + 1 >= UINT32_MAX) throw std::length_error("too many documents for one shard");
  const std::uint32_t largest = *std::max_element(ids.begin(), ids.end());
  if (header_.token_width == 2 && largest > UINT16_MAX) throw std::invalid_argument("token id needs 4 bytes");
  const std::uint64_t first = header_.num_tokens, trained_before = header_.num_trained;
  documents_.push_back({first, runs_.size(), source, 0, 0});
  append_runs(trained);
  documents_.back().trained = static_cast<std::uint32_t>(header_.num_trained - trained_before);
  append_starts(first, first + ids.size());
  if (header_.token_width == 2)
    append_tokens<std::uint16_t>(ids);
  else
    append_tokens<std::uint32_t>(ids);
  header_.max_token = std::max(header_.max_token, largest);
  header_.num_tokens += ids.size();
  header_.num_documents += 1;
}

void TokenFileWriter::append_runs(std::span<const bool> trained) {
  const auto end = trained.end();
  for (auto at = trained.begin() + 1;;) {
    const auto begin = std::find(at, end, true);
    if (begin == end) return;
    at = std::find(begin, end, false);
    runs_.push_back(
        {static_cast<std::uint32_t>(begin - trained.begin()), static_cast<std::uint32_t>(at - trained.begin())});
    header_.num_trained += static_cast<std::uint64_t>(at - begin);
  }
}

void TokenFileWriter::append_starts(std::uint64_t first, std::uint64_t end) {
  const std::uint64_t step = kPage / header_.token_width;
  for (std::uint64_t block = (first + step - 1) / step; block * step < end; ++block)
    starts_.push_back(static_cast<std::uint32_t>(header_.num_documents));
}

template <typename Token>
void TokenFileWriter::append_tokens(std::span<const std::uint32_t> ids) {
  while (!ids.empty()) {
    if (buffered_ == kBuffer) flush();
    const std::size_t count = std::min<std::size_t>(ids.size(), (kBuffer - buffered_) / sizeof(Token));
    auto* out = reinterpret_cast<Token*>(buffer_.data() + buffered_);
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<Token>(ids[i]);
    buffered_ += count * sizeof(Token);
    ids = ids.subspan(count);
  }
}

void TokenFileWriter::append_bytes(const void* data, std::uint64_t size) {
  const auto* from = static_cast<const std::byte*>(data);
  while (size > 0) {
    if (buffered_ == kBuffer) flush();
    const std::uint64_t count = std::min(size, kBuffer - buffered_);
    std::memcpy(buffer_.data() + buffered_, from, count);
    buffered_ += count;
    from += count;
    size -= count;
  }
}

// Fills up to the next multiple of 64 bytes, where a section begins.
std::uint64_t TokenFileWriter::pad() {
  constexpr std::byte zeros[64]{};
  append_bytes(zeros, (64 - (written_ + buffered_) % 64) % 64);
  return written_ + buffered_;
}

void TokenFileWriter::flush() {
  for (std::uint64_t at = 0; at < buffered_; at += kPage)
    checksums_.push_back(crc32c(buffer_.data() + at, std::min(kPage, buffered_ - at)));
  write_exactly(buffer_.data(), buffered_, written_);
  written_ += buffered_;
  buffered_ = 0;
}

std::uint32_t TokenFileWriter::finish() {
  if (fd_ < 0) throw std::logic_error("the file is finished");
  header_.num_runs = runs_.size();
  documents_.push_back({header_.num_tokens, header_.num_runs, 0, 0, 0});
  header_.documents_at = pad();
  append_bytes(documents_.data(), documents_.size() * sizeof(DocumentRecord));
  header_.runs_at = pad();
  append_bytes(runs_.data(), runs_.size() * sizeof(Run));
  header_.starts_at = pad();
  append_bytes(starts_.data(), starts_.size() * sizeof(std::uint32_t));
  header_.checksums_at = pad();
  flush();
  const std::uint64_t table = checksums_.size() * sizeof(std::uint32_t);
  header_.checksums_crc = crc32c(checksums_.data(), table);
  header_.file_size = header_.checksums_at + table;
  write_exactly(checksums_.data(), table, header_.checksums_at);
  // The header comes last and only after the rest is on the disk: a file that was cut short has no magic.
  if (::fsync(fd_) != 0) failed("cannot flush");
  std::vector<std::byte> page(kPage);
  std::memcpy(page.data(), &header_, sizeof header_);
  const std::uint32_t crc = crc32c(page.data(), kPage - 4);
  std::memcpy(page.data() + kPage - 4, &crc, 4);
  write_exactly(page.data(), kPage, 0);
  if (::fsync(fd_) != 0) failed("cannot flush");
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0) failed("cannot close");
  return crc;
}

void TokenFileWriter::write_exactly(const void* data, std::uint64_t size, std::uint64_t offset) {
  const auto* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t put = ::pwrite(fd_, from, size, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) failed("cannot write");
    from += put;
    offset += static_cast<std::uint64_t>(put);
    size -= static_cast<std::uint64_t>(put);
  }
}

void TokenFileWriter::failed(const char* what) const {
  throw std::filesystem::filesystem_error(what, path_, std::error_code(errno, std::generic_category()));
}

}  // namespace llamahome
