#include "sample_order.h"

#include <algorithm>
#include <bit>
#include <cstdlib>  // defines __GLIBC__ for vector_clones.h
#include <numeric>
#include <stdexcept>

#include "vector_clones.h"

namespace llamahome {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): the next state and its output.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// MurmurHash3's 32-bit finaliser.
inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6B;
  x ^= x >> 13;
  x *= 0xC2B2AE35;
  return x ^ (x >> 16);
}

LLAMAHOME_CLONES void apply_rounds(std::uint64_t* values, std::size_t count, int low_bits, std::uint32_t low_mask,
                                   std::uint32_t high_mask, const std::uint32_t* keys, int rounds) {
  for (std::size_t i = 0; i < count; ++i) {
    auto high = static_cast<std::uint32_t>(values[i] >> low_bits);
    auto low = static_cast<std::uint32_t>(values[i]) & low_mask;
    for (int round = 0; round < rounds; round += 2) {
      high = (high + mix(low ^ keys[round])) & high_mask;
      low = (low + mix(high ^ keys[round + 1])) & low_mask;
    }
    values[i] = static_cast<std::uint64_t>(high) << low_bits | low;
  }
}

}  // namespace

Permutation::Permutation(std::uint64_t size, std::uint64_t seed, std::uint64_t stream) : size_(size) {
  const int bits = std::max(2, static_cast<int>(std::bit_width(size > 1 ? size - 1 : 1)));
  low_bits_ = bits / 2;
  low_mask_ = static_cast<std::uint32_t>((std::uint64_t{1} << low_bits_) - 1);
  high_mask_ = static_cast<std::uint32_t>((std::uint64_t{1} << (bits - low_bits_)) - 1);
  std::uint64_t state = seed;
  state = next_random(state) ^ stream;
  for (std::uint32_t& key : keys_) key = static_cast<std::uint32_t>(next_random(state) >> 32);
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  std::int64_t value;
  fill(index, std::span(&value, 1));
  return static_cast<std::uint64_t>(value);
}

void Permutation::fill(std::uint64_t start, std::span<std::int64_t> out) const {
  constexpr std::size_t kPart = 512;
  std::uint64_t values[kPart];
  std::uint32_t slots[kPart];
  for (std::size_t done = 0; done < out.size(); done += kPart) {
    std::size_t pending = std::min(kPart, out.size() - done);
    for (std::size_t i = 0; i < pending; ++i) {
      values[i] = start + done + i;
      slots[i] = static_cast<std::uint32_t>(i);
    }
    while (pending > 0) {
      apply_rounds(values, pending, low_bits_, low_mask_, high_mask_, keys_.data(), kRounds);
      std::size_t outside = 0;  // at most half on average: they walk on
      for (std::size_t i = 0; i < pending; ++i) {
        const std::uint64_t value = values[i];
        const std::uint32_t slot = slots[i];
        if (value < size_) out[done + slot] = static_cast<std::int64_t>(value);
        values[outside] = value;
        slots[outside] = slot;
        outside += value >= size_;
      }
      pending = outside;
    }
  }
}

SampleOrder::SampleOrder(std::uint64_t size, std::uint64_t seed, std::uint64_t epoch, bool shuffle, std::uint64_t block)
    : size_(size),
      seed_(seed),
      epoch_(epoch),
      block_(block),
      shuffle_(shuffle),
      permutation_(block == 0 ? size : (size + block - 1) / block, seed, epoch) {
  if (size > INT64_MAX) throw std::invalid_argument("too many samples");
  if (block != 0 && (block > kWindow || kWindow % block != 0))
    throw std::invalid_argument("a block of samples must divide 1024");
}

void SampleOrder::fill(std::uint64_t start, std::span<std::int64_t> out) const {
  if (start > size_ || out.size() > size_ - start) throw std::out_of_range("position beyond the end of the epoch");
  if (!shuffle_) {
    std::iota(out.begin(), out.end(), static_cast<std::int64_t>(start));
  } else if (block_ == 0) {
    permutation_.fill(start, out);
  } else {
    for (std::int64_t& sample : out) {
      std::uint64_t value = start++;
      do value = in_blocks(value);
      while (value >= size_);  // the last block may be short: what falls behind the end walks on
      sample = static_cast<std::int64_t>(value);
    }
  }
}

// A permutation of [0, blocks x block): the window of a position, a place within it, the block that is there.
std::uint64_t SampleOrder::in_blocks(std::uint64_t position) const {
  const std::uint64_t window = position / kWindow, first = window * (kWindow / block_);
  const std::uint64_t blocks = std::min(kWindow / block_, permutation_.size() - first);
  // Another key than the blocks' own, and one for each window.
  std::uint64_t stream = ~window;
  stream = next_random(stream) ^ epoch_;
  const std::uint64_t place = Permutation(blocks * block_, seed_, stream)(position % kWindow);
  return permutation_(first + place / block_) * block_ + place % block_;
}

}  // namespace llamahome
