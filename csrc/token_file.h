// One shard of a token store: the format's structures and its reader. docs/token-store.md specifies every byte.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace llamahome {

static_assert(std::endian::native == std::endian::little, "token files are read in place and are little-endian");

inline constexpr char kMagic[8] = {'\x89', 'L', 'H', 'T', 'O', 'K', '\r', '\n'};
inline constexpr std::uint32_t kVersion = 1;
inline constexpr std::uint64_t kPage = 4096;  // bytes of the header, and of a block that has one checksum
inline constexpr std::uint64_t kMaxFileSize = std::uint64_t{1} << 62;

// The start of the file. The rest of its page is zero but for the last four bytes: CRC-32C of the 4092 before them.
struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t token_width;  // bytes of a token: 2 or 4
  std::uint64_t num_documents;
  std::uint64_t num_tokens;
  std::uint64_t num_trained;
  std::uint64_t num_runs;
  std::uint64_t documents_at;  // file offsets of the sections; tokens begin at kPage
  std::uint64_t runs_at;
  std::uint64_t starts_at;
  std::uint64_t checksums_at;
  std::uint64_t file_size;
  std::uint32_t max_token;
  std::uint32_t checksums_crc;
};
static_assert(sizeof(Header) == 96);

// One per document and one more that ends the last: document i has tokens [token(i), token(i + 1)).
struct DocumentRecord {
  std::uint64_t token;
  std::uint64_t run;
  std::uint64_t source;  // where the row came from; opaque here
  std::uint32_t trained;
  std::uint32_t reserved;
};
static_assert(sizeof(DocumentRecord) == 32);

// Trained tokens [begin, end) of a document, counted from its start. Runs ascend and do not touch.
struct Run {
  std::uint32_t begin;
  std::uint32_t end;
};
static_assert(sizeof(Run) == 8);

// The file is not what it claims to be. `offset` is the byte where that was seen.
class DamagedFile : public std::runtime_error {
 public:
  DamagedFile(const std::string& what, std::string file, std::uint64_t at)
      : std::runtime_error(what), path(std::move(file)), offset(at) {}
  std::string path;
  std::uint64_t offset;
};

struct Document {
  std::uint64_t token;  // first token, counted within the file
  std::uint64_t run;
  std::uint64_t source;
  std::uint32_t length;
  std::uint32_t num_runs;
  std::uint32_t trained;
};

// kMap reads through a mapping: fastest. kRead copies with pread: resident memory stays flat, and a file that shrinks
// while it is read, or a disk that fails, is always an error and never a signal.
enum class ReadMode { kMap, kRead };

using Scratch = std::vector<std::byte>;

// Opening checks the header and the table of checksums; every other block is checked when it is first touched, so that
// opening costs the same for any number of documents. Thread-safe; throws DamagedFile or
// std::filesystem::filesystem_error.
class TokenFile {
 public:
  TokenFile(std::string path, ReadMode mode);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  const Header& header() const { return header_; }
  const std::string& path() const { return path_; }
  std::uint32_t header_crc() const { return header_crc_; }

  // Throws if the file has shrunk since it was opened: touching its missing pages would be SIGBUS.
  void check_size() const;

  Document document(std::uint64_t index, Scratch& scratch) const;

  // A document at or before the one with this token, at most a block of tokens away.
  std::uint32_t document_at(std::uint64_t token, Scratch& scratch) const;
  // The same without a look at that document's record.
  std::uint32_t peek_document_at(std::uint64_t token, Scratch& scratch) const;

  // The runs of a document, checked to lie within it and to add up. Valid until `scratch` is used again.
  const Run* runs(const Document& document, std::uint64_t index, Scratch& scratch) const;

  // Tokens [first, first + count), of header().token_width bytes each.
  const std::byte* tokens(std::uint64_t first, std::uint64_t count, Scratch& scratch) const {
    const std::uint64_t width = header_.token_width;
    return bytes(kPage + first * width, count * width, scratch);
  }

  // Hints to the processor's cache. They check nothing and never fault.
  void prefetch_record(std::uint64_t index) const;
  void prefetch_tokens(std::uint64_t first, std::uint64_t count) const;
  void prefetch_runs(std::uint64_t run) const;
  void prefetch_start(std::uint64_t token) const;      // for document_at
  void prefetch_record_at(std::uint64_t token) const;  // for the document that it gives
  void prefetch_runs_at(std::uint64_t token) const;    // for that document's runs

  // Asks the kernel to begin reading these bytes of the file. Only a hint.
  void will_need(std::uint64_t offset, std::uint64_t size) const noexcept;
  // The same for what document, document_at and runs read, in chunks of 64 KiB and once for each: on a cold disk a
  // lookup would otherwise wait for its page behind all the tokens that were asked for.
  void will_need_record(std::uint64_t index) const noexcept;
  void will_need_start(std::uint64_t token) const noexcept;
  void will_need_runs(const Document& document) const noexcept;
  // Whether the page with this byte is in memory already; true where the system cannot say.
  bool resident(std::uint64_t offset) const noexcept;

  // Checks every block, record and token.
  void verify() const;

 private:
  const std::byte* bytes(std::uint64_t offset, std::uint64_t size, Scratch& scratch) const {
    if (map_ == nullptr) return read(offset, size, scratch);
    if (size != 0) {
      const std::uint64_t last = (offset + size - 1) / kPage - 1;
      for (std::uint64_t block = offset / kPage - 1; block <= last; ++block)
        if (!is_checked(block)) check_block(block, map_ + (block + 1) * kPage);
    }
    return map_ + offset;
  }
  std::uint32_t peek_start(std::uint64_t token) const;
  std::uint64_t start_at(std::uint64_t token) const {
    return header_.starts_at + token * header_.token_width / kPage * sizeof(std::uint32_t);
  }
  bool is_checked(std::uint64_t block) const {
    return checked_[block / 64].load(std::memory_order_relaxed) >> (block % 64) & 1;
  }
  std::uint64_t block_size(std::uint64_t block) const;
  const std::byte* read(std::uint64_t offset, std::uint64_t size, Scratch& scratch) const;
  void check_block(std::uint64_t block, const std::byte* data) const;
  void read_exactly(void* out, std::uint64_t size, std::uint64_t offset) const;
  void open_and_map(ReadMode mode);
  void close() noexcept;
  void will_need_chunk(std::uint64_t offset) const noexcept;
  void check_header(std::uint64_t file_size);
  void check_checksums() const;
  std::uint32_t checksum(std::uint64_t block) const;
  void verify_tokens() const;
  void verify_documents() const;
  void verify_starts() const;
  [[noreturn]] void damaged(const std::string& what, std::uint64_t offset) const;
  [[noreturn]] void failed(const char* what) const;

  std::string path_;
  int fd_ = -1;
  std::byte* map_ = nullptr;
  Header header_{};
  std::uint32_t header_crc_ = 0;
  mutable std::unique_ptr<std::atomic<std::uint64_t>[]> checked_;  // a bit per block
  mutable std::unique_ptr<std::atomic<std::uint64_t>[]> asked_;    // a bit per chunk
};

}  // namespace llamahome
