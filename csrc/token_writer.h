// Writes one shard of a token store, streaming: tokens go to the file as they come, the index follows at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "token_file.h"

namespace llamahome {

// Memory is a buffer of 1 MiB plus 32 bytes a document and 8 a run. After any exception the file is to be deleted.
class TokenFileWriter {
 public:
  TokenFileWriter(std::string path, std::uint32_t token_width);
  ~TokenFileWriter();
  TokenFileWriter(const TokenFileWriter&) = delete;
  TokenFileWriter& operator=(const TokenFileWriter&) = delete;

  // Adds one document of at least one token. trained[0] is taken as false: nothing predicts a first token.
  void append(std::span<const std::uint32_t> ids, std::span<const bool> trained, std::uint64_t source);

  // Writes index, checksums and header, and makes the file durable. Returns the header's checksum.
  std::uint32_t finish();

  const Header& header() const { return header_; }
  std::uint64_t index_bytes() const {
    return documents_.size() * sizeof(DocumentRecord) + runs_.size() * sizeof(Run) + starts_.size() * 4;
  }

 private:
  void append_runs(std::span<const bool> trained);
  void append_starts(std::uint64_t first, std::uint64_t end);
  template <typename Token>
  void append_tokens(std::span<const std::uint32_t> ids);
  void append_bytes(const void* data, std::uint64_t size);
  std::uint64_t pad();
  void flush();
  void write_exactly(const void* data, std::uint64_t size, std::uint64_t offset);
  [[noreturn]] void failed(const char* what) const;

  std::string path_;
  int fd_ = -1;
  Header header_{};
  std::vector<std::byte> buffer_;
  std::uint64_t buffered_ = 0;
  std::uint64_t written_ = kPage;  // end of what is in the file
  std::vector<DocumentRecord> documents_;
  std::vector<Run> runs_;
  std::vector<std::uint32_t> starts_;
  std::vector<std::uint32_t> checksums_;
};

}  // namespace llamahome
