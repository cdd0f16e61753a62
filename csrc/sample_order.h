// The order of samples: a seeded permutation that is computed, not stored.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace llamahome {

// A permutation of [0, size), fixed by (seed, epoch), in O(1) memory: a Feistel network over the next power of two,
// walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Part of the format
// of a run: the same arguments must give the same order in every later version.
class SampleOrder {
 public:
  SampleOrder(std::uint64_t size, std::uint64_t seed, std::uint64_t epoch, bool shuffle);

  std::uint64_t size() const { return size_; }

  // Writes the samples at positions start, start + 1, ...; throws std::out_of_range beyond the end.
  void fill(std::uint64_t start, std::span<std::int64_t> out) const;

 private:
  static constexpr int kRounds = 8;

  std::uint64_t size_;
  bool shuffle_;
  int low_bits_;
  std::uint32_t low_mask_;
  std::uint32_t high_mask_;
  std::array<std::uint32_t, kRounds> keys_;
};

}  // namespace llamahome
