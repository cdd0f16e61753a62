// Reads batches from the shards of a token store into the caller's buffers.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "read_ahead.h"
#include "token_file.h"

namespace llamahome {

inline constexpr std::int64_t kIgnored = -100;  // the label of a token that is not trained

// Documents and tokens are numbered through all shards, in the order given. Ids are checked; every method is
// thread-safe, touches no Python, and throws DamagedFile, std::filesystem::filesystem_error, std::out_of_range for an
// id that does not exist, or std::invalid_argument for buffers of the wrong size.
class BatchReader {
 public:
  BatchReader(const std::vector<std::string>& paths, ReadMode mode);
  ~BatchReader();

  std::uint64_t num_documents() const { return first_document_.back(); }
  std::uint64_t num_tokens() const { return first_token_.back(); }
  std::uint64_t num_trained() const { return num_trained_; }
  const std::vector<std::unique_ptr<TokenFile>>& files() const { return files_; }

  void lengths(std::span<const std::int64_t> ids, std::span<std::uint32_t> out) const;
  void trained_counts(std::span<const std::int64_t> ids, std::span<std::uint32_t> out) const;
  void sources(std::span<const std::int64_t> ids, std::span<std::uint64_t> out) const;

  // Lays the documents end to end: ids, labels (not shifted; kIgnored where not trained and at every first token),
  // positions from 0 in each document, and in cu_seqlens the ids.size() + 1 bounds. Returns the number of trained
  // tokens.
  std::uint64_t pack(std::span<const std::int64_t> ids, std::span<std::int64_t> input_ids,
                     std::span<std::int64_t> labels, std::span<std::int64_t> positions,
                     std::span<std::int32_t> cu_seqlens) const;

  // Rows of `width` tokens cut from the stream of all tokens; row r begins at token r * width. Labels as in pack, and
  // kIgnored at each row's first token. Past the end of the stream ids are 0 and labels kIgnored.
  std::uint64_t rows(std::span<const std::int64_t> rows, std::uint64_t width, std::span<std::int64_t> input_ids,
                     std::span<std::int64_t> labels) const;

  // Start reading what a later pack or rows will need. A hint: returns at once, does nothing if it is in memory.
  void prefetch(std::span<const std::int64_t> ids);
  void prefetch_rows(std::span<const std::int64_t> rows, std::uint64_t width);

  // Checks every byte of one file.
  void verify(std::size_t file) const;

 private:
  struct Place {
    const TokenFile* file;
    std::uint64_t index;  // document or token, counted within the file
  };
  // A part of a row, within one file.
  struct Piece {
    const TokenFile* file;
    std::uint64_t first;  // token within the file
    std::uint64_t count;
    std::uint64_t at;  // where it goes in the output
  };
  Place find(const std::vector<std::uint64_t>& firsts, std::uint64_t index) const;
  Place find_document(std::int64_t id) const;
  std::vector<Piece> cut_rows(std::span<const std::int64_t> rows, std::uint64_t width) const;
  void check_sizes(std::span<const std::int64_t> ids) const;
  void check_sizes(std::span<const Piece> pieces) const;
  template <typename Value, typename Get>
  void collect(std::span<const std::int64_t> ids, std::span<Value> out, Get get) const;
  std::uint64_t read_piece(const Piece& piece, std::int64_t* ids, std::int64_t* labels, Scratch& tokens,
                           Scratch& index) const;
  void read_ahead(std::vector<FileRange> ranges);

  std::vector<std::unique_ptr<TokenFile>> files_;
  std::vector<std::uint64_t> first_document_{0};
  std::vector<std::uint64_t> first_token_{0};
  std::uint64_t num_trained_ = 0;
  std::atomic<ReadAhead*> ahead_{nullptr};  // made at the first prefetch, and again in a forked child
};

}  // namespace llamahome
