// The order of samples: a seeded permutation that is computed, not stored.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace llamahome {

// A permutation of [0, size) by a Feistel network over the next power of two, walked until it lands inside (Black and
// Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
class Permutation {
 public:
  Permutation(std::uint64_t size, std::uint64_t seed, std::uint64_t stream);

  std::uint64_t size() const { return size_; }
  std::uint64_t operator()(std::uint64_t index) const;
  void fill(std::uint64_t start, std::span<std::int64_t> out) const;

 private:
  static constexpr int kRounds = 8;

  std::uint64_t size_;
  int low_bits_;
  std::uint32_t low_mask_;
  std::uint32_t high_mask_;
  std::array<std::uint32_t, kRounds> keys_;
};

// The samples of an epoch, fixed by (seed, epoch), in O(1) memory. Part of the format of a run: the same arguments must
// give the same order in every later version.
//
// block = 0 shuffles all samples evenly. Otherwise blocks of that many neighbours stay near each other, for disks where
// random reads are dear: blocks are shuffled over the epoch, then samples within windows of kWindow.
class SampleOrder {
 public:
  static constexpr std::uint64_t kWindow = 1024;

  SampleOrder(std::uint64_t size, std::uint64_t seed, std::uint64_t epoch, bool shuffle, std::uint64_t block = 0);

  // Writes the samples at positions start, start + 1, ...; throws std::out_of_range beyond the end.
  void fill(std::uint64_t start, std::span<std::int64_t> out) const;

 private:
  std::uint64_t in_blocks(std::uint64_t position) const;

  std::uint64_t size_, seed_, epoch_, block_;
  bool shuffle_;
  Permutation permutation_;  // of the samples, or of their blocks
};

}  // namespace llamahome
