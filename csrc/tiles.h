// Products of matrices that lie in the caches: 6 rows of A, broadcast unit by unit, times up to 64 columns of B. A unit
// is `Numbers::kPerUnit` neighbours along the dimension that is summed over; sums are fp32.
//
// Include it after bf16_numbers.h or fp32_numbers.h, which say what numbers there are, and for which processors.
#pragma once

#include "lanes.h"

namespace llamahome {
namespace {

using Element = Numbers::Element;
using Unit = Numbers::Unit;

constexpr std::int64_t kPerUnit = Numbers::kPerUnit;
constexpr std::int64_t kRows = 6;   // of a micro-kernel
constexpr std::int64_t kTile = 64;  // columns of a micro-kernel

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size, bool zero = true)
      : data_(static_cast<T*>(::operator new(bytes(size), std::align_val_t(64)))) {
    if (zero) std::memset(static_cast<void*>(data_), 0, bytes(size));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static std::size_t bytes(std::int64_t size) { return static_cast<std::size_t>(size) * sizeof(T); }
  T* data_;
};

// A unit of A at (row, k) is a[row * row_step + k * step]; B [k][columns] has rows of `stride` units.
struct Left {
  const Unit* data;
  std::int64_t row_step, step;
};

// c [6, 16 * Vectors] (+)= A [6, count] B [count, 16 * Vectors], `count` in units
template <int Vectors, bool Add>
void multiply_tile(const Left& a, const Unit* b, std::int64_t stride, std::int64_t count, float* c,
                   std::int64_t c_stride) {
  // Two sums of every other unit where one alone would wait for each addition to end.
  constexpr int kChains = Vectors == 1 ? 2 : 1;
  __m512 sum[kChains][kRows][Vectors];
#pragma GCC unroll 2
  for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j)
        sum[chain][i][j] = Add && chain == 0 ? _mm512_load_ps(c + i * c_stride + 16 * j) : _mm512_setzero_ps();
  const auto step = [&](std::int64_t k, int chain) {
    Numbers::Units right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = Numbers::load(b + k * stride + 16 * j);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Numbers::Units left = Numbers::broadcast(a.data[i * a.row_step + k * a.step]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[chain][i][j] = Numbers::add_product(sum[chain][i][j], left, right[j]);
    }
  };
  std::int64_t k = 0;
  for (; k + kChains <= count; k += kChains)
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) step(k + chain, chain);
  if (k < count) step(k, 0);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      if constexpr (kChains == 2) sum[0][i][j] = _mm512_add_ps(sum[0][i][j], sum[1][i][j]);
      _mm512_store_ps(c + i * c_stride + 16 * j, sum[0][i][j]);
    }
}

template <bool Add>
void multiply(const Left& a, const Unit* b, std::int64_t stride, std::int64_t count, float* c, std::int64_t c_stride,
              std::int64_t vectors) {
  switch (vectors) {
    case 1:
      return multiply_tile<1, Add>(a, b, stride, count, c, c_stride);
    case 2:
      return multiply_tile<2, Add>(a, b, stride, count, c, c_stride);
    case 3:
      return multiply_tile<3, Add>(a, b, stride, count, c, c_stride);
    default:
      return multiply_tile<4, Add>(a, b, stride, count, c, c_stride);
  }
}

// Six rows times B [count][width], width a multiple of 16.
template <bool Add>
void multiply_rows(const Left& a, const Unit* b, std::int64_t count, float* c, std::int64_t width) {
  for (std::int64_t j = 0; j < width; j += kTile)
    multiply<Add>(a, b + j, width, count, c + j, width, (width - j < kTile ? width - j : kTile) / kLanes);
}

// `length` rows of `size` numbers each, a multiple of 16, `stride` apart.
struct Rows {
  const Element* data;
  std::int64_t stride, length, size;
  const Element* row(std::int64_t i) const { return data + i * stride; }
};

// [padded][size]: rows one after the other, zeros at the end; `to` is zero.
void pack_rows(const Rows& x, Unit* to) {
  for (std::int64_t i = 0; i < x.length; ++i)
    std::memcpy(to + i * (x.size / kPerUnit), x.row(i), static_cast<std::size_t>(x.size) * sizeof(Element));
}

// B of a product over rows: [row / kPerUnit][size].
void pack_over_rows(const Rows& x, Unit* to) {
  constexpr std::int64_t kAhead = 32;  // rows; those far apart are not foreseen by the processor
  for (std::int64_t i = 0; i < x.length; i += kPerUnit, to += x.size) {
    Numbers::Lanes rows[kPerUnit];
    for (std::int64_t r = 0; r < kPerUnit && i + kAhead + r < x.length; ++r)
      for (std::int64_t j = 0; j < x.size; j += 64 / sizeof(Element)) __builtin_prefetch(x.row(i + kAhead + r) + j);
    if (i + kPerUnit <= x.length) {
#pragma GCC unroll 4
      for (std::int64_t j = 0; j < x.size; j += kLanes) {
        for (std::int64_t r = 0; r < kPerUnit; ++r) rows[r] = Numbers::read(x.row(i + r) + j);
        Numbers::join(to + j, rows);
      }
    } else {
      for (std::int64_t j = 0; j < x.size; j += kLanes) {
        for (std::int64_t r = 0; r < kPerUnit; ++r)
          rows[r] = i + r < x.length ? Numbers::read(x.row(i + r) + j) : Numbers::zeros();
        Numbers::join(to + j, rows);
      }
    }
  }
}

// 16 rows of 16 units each, `stride` apart, as columns: to[j * kTile + i] = from[i * stride + j].
void turn_units(const Unit* from, std::int64_t stride, Unit* to) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quarters of the first and of the last eight rows
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int first = i % 4 + i / 4 * 4;
    _mm512_store_si512(to + i * kTile, _mm512_shuffle_i32x4(y[first], y[first + 8], 0x88));
    _mm512_store_si512(to + (i + 8) * kTile, _mm512_shuffle_i32x4(y[first], y[first + 8], 0xDD));
  }
}

// B of a product over the size: tiles of 64 rows, each [size / kPerUnit][64].
void pack_over_size(const Rows& x, Unit* to) {
  const std::int64_t units = x.size / kPerUnit;
  const std::int64_t whole_rows = x.length / kLanes * kLanes, whole_units = units / kLanes * kLanes;
  for (std::int64_t i = 0; i < x.length; ++i) {
    Unit* column = to + i / kTile * units * kTile + i % kTile;
    std::int64_t j = 0;
    if (i < whole_rows) {
      if (i % kLanes == 0)
        for (; j < whole_units; j += kLanes)
          turn_units(reinterpret_cast<const Unit*>(x.row(i) + kPerUnit * j), x.stride / kPerUnit, column + j * kTile);
      j = whole_units;
    }
    for (; j < units; ++j) std::memcpy(column + j * kTile, x.row(i) + kPerUnit * j, sizeof(Unit));
  }
}

}  // namespace
}  // namespace llamahome
