#include "batch_reader.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "widen.h"

namespace llamahome {
namespace {

// How far the processor's cache is asked ahead, in documents: records are 1 or 2 lines, tokens up to 4.
constexpr std::size_t kRecordsAhead = 16;
constexpr std::size_t kTokensAhead = 4;
constexpr std::size_t kPiecesAhead = 16;

// Calls f with the tokens typed by their width.
template <typename F>
void with_tokens(const TokenFile& file, std::uint64_t first, std::uint64_t count, Scratch& scratch, F f) {
  const std::byte* data = file.tokens(first, count, scratch);
  if (file.header().token_width == 2)
    f(reinterpret_cast<const std::uint16_t*>(data));
  else
    f(reinterpret_cast<const std::uint32_t*>(data));
}

// Only one run is possible then, [1, length), and there is no need to read it.
bool is_all_trained(const Document& d) { return d.trained == d.length - 1; }

// Marks what is not trained in the labels of a document's tokens [begin, end), which hold the ids so far; returns how
// many are trained.
std::uint64_t ignore_gaps(const Run* runs, std::uint32_t num_runs, std::uint64_t begin, std::uint64_t end,
                          std::int64_t* labels) {
  std::uint64_t at = begin, trained = 0;
  for (std::uint32_t i = 0; i < num_runs && at < end; ++i) {
    const std::uint64_t from = std::clamp<std::uint64_t>(runs[i].begin, at, end);
    const std::uint64_t to = std::clamp<std::uint64_t>(runs[i].end, from, end);
    std::fill(labels + (at - begin), labels + (from - begin), kIgnored);
    trained += to - from;
    at = to;
  }
  std::fill(labels + (at - begin), labels + (end - begin), kIgnored);
  return trained;
}

void check_each_once(std::vector<const TokenFile*>& files) {
  std::sort(files.begin(), files.end());
  files.erase(std::unique(files.begin(), files.end()), files.end());
  for (const TokenFile* file : files) file->check_size();
}

// One request for ranges that lie together: what was shuffled in blocks is read in blocks.
void merge(std::vector<FileRange>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const FileRange& a, const FileRange& b) {
    return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
  });
  std::size_t last = 0;
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    FileRange& before = ranges[last];
    if (ranges[i].file == before.file && ranges[i].offset <= before.offset + before.size + kPage)
      before.size = std::max(before.offset + before.size, ranges[i].offset + ranges[i].size) - before.offset;
    else
      ranges[++last] = ranges[i];
  }
  ranges.resize(std::min(ranges.size(), last + 1));
}

}  // namespace

BatchReader::BatchReader(const std::vector<std::string>& paths, ReadMode mode) {
  for (const std::string& path : paths) {
    files_.push_back(std::make_unique<TokenFile>(path, mode));
    const Header& header = files_.back()->header();
    // Sums of file sizes: 2^62 bytes each, so the second file could already overflow.
    if (header.num_tokens > INT64_MAX - num_tokens()) throw std::length_error("too many tokens");
    first_document_.push_back(num_documents() + header.num_documents);
    first_token_.push_back(num_tokens() + header.num_tokens);
    num_trained_ += header.num_trained;
  }
}

BatchReader::~BatchReader() {
  ReadAhead* ahead = ahead_.load();
  if (ahead != nullptr && ahead->is_usable()) delete ahead;
}

BatchReader::Place BatchReader::find(const std::vector<std::uint64_t>& firsts, std::uint64_t index) const {
  if (files_.size() == 1) return {files_[0].get(), index};
  const auto after = std::upper_bound(firsts.begin(), firsts.end(), index);
  return {files_[static_cast<std::size_t>(after - firsts.begin()) - 1].get(), index - *(after - 1)};
}

BatchReader::Place BatchReader::find_document(std::int64_t id) const {
  if (id < 0 || static_cast<std::uint64_t>(id) >= num_documents())
    throw std::out_of_range("document " + std::to_string(id) + " of " + std::to_string(num_documents()));
  return find(first_document_, static_cast<std::uint64_t>(id));
}

// One fstat per file of the batch. What is truncated between this and the copy is still SIGBUS under a mapping: a
// window of microseconds, closed by ReadMode::kRead.
void BatchReader::check_sizes(std::span<const std::int64_t> ids) const {
  if (files_.size() == 1) return files_[0]->check_size();
  std::vector<const TokenFile*> touched;
  for (const std::int64_t id : ids) touched.push_back(find_document(id).file);
  check_each_once(touched);
}

void BatchReader::check_sizes(std::span<const Piece> pieces) const {
  if (files_.size() == 1) return files_[0]->check_size();
  std::vector<const TokenFile*> touched;
  for (const Piece& piece : pieces) touched.push_back(piece.file);
  check_each_once(touched);
}

template <typename Value, typename Get>
void BatchReader::collect(std::span<const std::int64_t> ids, std::span<Value> out, Get get) const {
  if (ids.size() != out.size()) throw std::invalid_argument("as many results as ids are needed");
  check_sizes(ids);
  for (const std::int64_t id : ids) {
    const Place place = find_document(id);
    place.file->will_need_record(place.index);
  }
  Scratch scratch;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + kRecordsAhead < ids.size()) {
      const Place later = find_document(ids[i + kRecordsAhead]);
      later.file->prefetch_record(later.index);
    }
    const Place place = find_document(ids[i]);
    out[i] = get(place.file->document(place.index, scratch));
  }
}

void BatchReader::lengths(std::span<const std::int64_t> ids, std::span<std::uint32_t> out) const {
  collect(ids, out, [](const Document& d) { return d.length; });
}

void BatchReader::trained_counts(std::span<const std::int64_t> ids, std::span<std::uint32_t> out) const {
  collect(ids, out, [](const Document& d) { return d.trained; });
}

void BatchReader::sources(std::span<const std::int64_t> ids, std::span<std::uint64_t> out) const {
  collect(ids, out, [](const Document& d) { return d.source; });
}

std::uint64_t BatchReader::pack(std::span<const std::int64_t> ids, std::span<std::int64_t> input_ids,
                                std::span<std::int64_t> labels, std::span<std::int64_t> positions,
                                std::span<std::int32_t> cu_seqlens) const {
  if (input_ids.size() > INT32_MAX || labels.size() != input_ids.size() || positions.size() != input_ids.size() ||
      cu_seqlens.size() != ids.size() + 1)
    throw std::invalid_argument("buffers of unequal size, or more tokens than int32 bounds can hold");
  std::vector<Document> documents(ids.size());
  collect(ids, std::span(documents), [](const Document& d) { return d; });
  std::uint64_t at = 0, trained = 0;
  for (const Document& d : documents) at += d.length;
  if (at != input_ids.size())
    throw std::invalid_argument("the documents have " + std::to_string(at) + " tokens, the buffers " +
                                std::to_string(input_ids.size()));
  at = 0;
  cu_seqlens[0] = 0;
  Scratch scratch;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + kTokensAhead < ids.size()) {
      const Document& later = documents[i + kTokensAhead];
      const TokenFile* file = find_document(ids[i + kTokensAhead]).file;
      file->prefetch_tokens(later.token, later.length);
      if (!is_all_trained(later)) file->prefetch_runs(later.run);
    }
    const Document& d = documents[i];
    const Place place = find_document(ids[i]);
    std::int64_t* const label = &labels[at];
    with_tokens(*place.file, d.token, d.length, scratch,
                [&](const auto* tokens) { widen_document(tokens, d.length, &input_ids[at], label, &positions[at]); });
    if (is_all_trained(d))
      label[0] = kIgnored;
    else
      ignore_gaps(place.file->runs(d, place.index, scratch), d.num_runs, 0, d.length, label);
    at += d.length;
    trained += d.trained;
    cu_seqlens[i + 1] = static_cast<std::int32_t>(at);
  }
  return trained;
}

std::uint64_t BatchReader::rows(std::span<const std::int64_t> rows, std::uint64_t width,
                                std::span<std::int64_t> input_ids, std::span<std::int64_t> labels) const {
  const std::vector<Piece> pieces = cut_rows(rows, width);
  if (input_ids.size() / width != rows.size() || input_ids.size() % width != 0 || labels.size() != input_ids.size())
    throw std::invalid_argument("the buffers need rows x width elements");
  check_sizes(pieces);
  Scratch tokens, index;
  std::uint64_t trained = 0;
  for (std::size_t group = 0; group < pieces.size(); group += kPiecesAhead) {
    const auto part = std::span(pieces).subspan(group, std::min(kPiecesAhead, pieces.size() - group));
    for (const Piece& p : part) {
      p.file->prefetch_start(p.first);
      p.file->prefetch_tokens(p.first, p.count);
    }
    for (const Piece& p : part) p.file->prefetch_record_at(p.first);
    for (const Piece& p : part) p.file->prefetch_runs_at(p.first);
    for (const Piece& p : part) trained += read_piece(p, &input_ids[p.at], &labels[p.at], tokens, index);
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::int64_t* const row = &labels[i * width];
    if (row[0] != kIgnored) --trained;  // nothing in the row predicts it
    row[0] = kIgnored;
    const std::uint64_t filled = std::min(width, num_tokens() - static_cast<std::uint64_t>(rows[i]) * width);
    std::fill(row + filled, row + width, kIgnored);
    std::fill(&input_ids[i * width] + filled, &input_ids[i * width] + width, 0);
  }
  return trained;
}

std::vector<BatchReader::Piece> BatchReader::cut_rows(std::span<const std::int64_t> rows, std::uint64_t width) const {
  if (width == 0) throw std::invalid_argument("rows of no tokens");
  const std::uint64_t num_rows = num_tokens() / width + (num_tokens() % width != 0);
  std::vector<Piece> pieces;
  pieces.reserve(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0 || static_cast<std::uint64_t>(rows[i]) >= num_rows)
      throw std::out_of_range("row " + std::to_string(rows[i]) + " of " + std::to_string(num_rows));
    std::uint64_t first = static_cast<std::uint64_t>(rows[i]) * width, at = i * width;
    for (std::uint64_t left = std::min(width, num_tokens() - first); left > 0;) {
      const Place place = find(first_token_, first);
      const std::uint64_t count = std::min(left, place.file->header().num_tokens - place.index);
      pieces.push_back({place.file, place.index, count, at});
      first += count, at += count, left -= count;
    }
  }
  return pieces;
}

// Reads a piece of the stream, of any number of documents; returns how many of its tokens are trained.
std::uint64_t BatchReader::read_piece(const Piece& piece, std::int64_t* ids, std::int64_t* labels, Scratch& tokens,
                                      Scratch& index) const {
  const TokenFile& file = *piece.file;
  with_tokens(file, piece.first, piece.count, tokens, [&](const auto* data) { widen(data, piece.count, ids, labels); });
  const std::uint64_t end = piece.first + piece.count;
  std::uint64_t trained = 0, number = file.document_at(piece.first, index);
  for (Document d = file.document(number, index);; d = file.document(++number, index)) {
    const std::uint64_t from = std::max(d.token, piece.first), to = std::min(d.token + d.length, end);
    if (from < to) {
      std::int64_t* const part = labels + (from - piece.first);
      if (is_all_trained(d)) {
        trained += to - from;
        if (from == d.token) --trained, part[0] = kIgnored;
      } else {
        trained += ignore_gaps(file.runs(d, number, index), d.num_runs, from - d.token, to - d.token, part);
      }
    }
    if (d.token + d.length >= end) return trained;
  }
}

void BatchReader::prefetch(std::span<const std::int64_t> ids) {
  std::vector<Document> documents(ids.size());
  collect(ids, std::span(documents), [](const Document& d) { return d; });
  std::vector<FileRange> ranges;
  ranges.reserve(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const TokenFile* file = find_document(ids[i]).file;
    const std::uint64_t width = file->header().token_width;
    if (!is_all_trained(documents[i])) file->will_need_runs(documents[i]);
    ranges.push_back({file, kPage + documents[i].token * width, documents[i].length * width});
  }
  read_ahead(std::move(ranges));
}

void BatchReader::prefetch_rows(std::span<const std::int64_t> rows, std::uint64_t width) {
  const std::vector<Piece> pieces = cut_rows(rows, width);
  check_sizes(pieces);
  // One thing leads to the next; each is asked for all rows before the first of them is waited for.
  for (const Piece& p : pieces) p.file->will_need_start(p.first);
  Scratch scratch;
  std::vector<std::uint32_t> numbers;
  for (const Piece& p : pieces) {
    numbers.push_back(p.file->peek_document_at(p.first, scratch));
    p.file->will_need_record(numbers.back());
  }
  std::vector<FileRange> ranges;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    const std::uint64_t bytes = p.file->header().token_width;
    p.file->will_need_runs(p.file->document(numbers[i], scratch));
    ranges.push_back({p.file, kPage + p.first * bytes, p.count * bytes});
  }
  read_ahead(std::move(ranges));
}

void BatchReader::read_ahead(std::vector<FileRange> ranges) {
  // A look at a few of them costs less than a request for each that finds everything there.
  constexpr std::size_t kLooks = 4;
  const std::size_t step = ranges.size() / kLooks + 1;
  bool resident = true;
  for (std::size_t i = 0; i < ranges.size() && resident; i += step)
    resident = ranges[i].file->resident(ranges[i].offset);
  if (resident) return;
  merge(ranges);
  ReadAhead* ahead = ahead_.load();
  if (ahead == nullptr || !ahead->is_usable()) {
    // After a fork the parent's object stays as it is: its thread is elsewhere and its mutex may be locked for ever.
    auto fresh = std::make_unique<ReadAhead>();
    if (ahead_.compare_exchange_strong(ahead, fresh.get())) ahead = fresh.release();
  }
  ahead->add(ranges);
}

void BatchReader::verify(std::size_t file) const { files_.at(file)->verify(); }

}  // namespace llamahome
