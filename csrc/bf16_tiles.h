// Products of bf16 matrices that lie in the caches, by vdpbf16ps: 6 rows of A, broadcast pair by pair, times up to 64
// columns of B, whose rows are interleaved in pairs. Sums are fp32.
//
// Include it last, and only in a .cpp file all of whose later functions may need AVX512-BF16: it sets the target, so
// that the build needs no flag and no inline function of another header is compiled for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLAMAHOME_AVX512_BF16
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace llamahome {

using Bf16 = std::uint16_t;  // its bits

namespace {

using Pair = std::uint32_t;  // two neighbours of bf16, the first in the low half

constexpr std::int64_t kRows = 6;   // of a micro-kernel
constexpr std::int64_t kTile = 64;  // columns of a micro-kernel
constexpr std::int64_t kLanes = 16;

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : data_(static_cast<T*>(::operator new(bytes(size), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data_), 0, bytes(size));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static std::size_t bytes(std::int64_t size) { return static_cast<std::size_t>(size) * sizeof(T); }
  T* data_;
};

// A pair of A at (row, k) is a[row * row_step + k * step]; B [k][columns] has rows of `stride` pairs.
struct Left {
  const Pair* data;
  std::int64_t row_step, step;
};

__m512bh pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// c [6, 16 * Vectors] (+)= A [6, 2 * count] B [2 * count, 16 * Vectors]
template <int Vectors, bool Add>
void multiply_tile(const Left& a, const Pair* b, std::int64_t stride, std::int64_t count, float* c,
                   std::int64_t c_stride) {
  __m512 sum[kRows][Vectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Add ? _mm512_load_ps(c + i * c_stride + 16 * j) : _mm512_setzero_ps();
  for (std::int64_t k = 0; k < count; ++k) {
    __m512bh right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = pairs(_mm512_load_si512(b + k * stride + 16 * j));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512bh left = pairs(_mm512_set1_epi32(static_cast<int>(a.data[i * a.row_step + k * a.step])));
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) _mm512_store_ps(c + i * c_stride + 16 * j, sum[i][j]);
}

template <bool Add>
void multiply(const Left& a, const Pair* b, std::int64_t stride, std::int64_t count, float* c, std::int64_t c_stride,
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
void multiply_rows(const Left& a, const Pair* b, std::int64_t count, float* c, std::int64_t width) {
  for (std::int64_t j = 0; j < width; j += kTile)
    multiply<Add>(a, b + j, width, count, c + j, width, (width - j < kTile ? width - j : kTile) / kLanes);
}

__m512 widen(const Bf16* x) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

__m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

// Two rows of bf16 as pairs, the first in the low halves.
__m512i interleave(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// e^x for x <= 0 to two units in the last place: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
__m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.f / 720);
  constexpr float kCoefficients[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (const float c : kCoefficients) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// The lanes of the 16 columns from `column` that are below `limit`.
__mmask16 below(std::int64_t limit, std::int64_t column) {
  const std::int64_t count = limit - column;
  return count >= kLanes ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>(count <= 0 ? 0 : (1 << count) - 1);
}

// `length` rows of `size` numbers each, a multiple of 16, `stride` apart.
struct Rows {
  const Bf16* data;
  std::int64_t stride, length, size;
  const Bf16* row(std::int64_t i) const { return data + i * stride; }
};

// [padded][size]: rows one after the other, zeros at the end; `to` is zero.
void pack_rows(const Rows& x, Pair* to) {
  for (std::int64_t i = 0; i < x.length; ++i)
    std::memcpy(to + i * (x.size / 2), x.row(i), static_cast<std::size_t>(x.size) * sizeof(Bf16));
}

// B of a product over rows: [row / 2][size], neighbouring rows interleaved.
void pack_over_rows(const Rows& x, Pair* to) {
  for (std::int64_t i = 0; i < x.length; i += 2)
    for (std::int64_t j = 0; j < x.size; j += kLanes) {
      const auto load = [&](std::int64_t row) {
        return row < x.length ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.row(row) + j))
                              : _mm256_setzero_si256();
      };
      _mm512_store_si512(to + i / 2 * x.size + j, interleave(load(i), load(i + 1)));
    }
}

// B of a product over the size: tiles of 64 rows, each [size / 2][64].
void pack_over_size(const Rows& x, Pair* to) {
  const std::int64_t half = x.size / 2;
  for (std::int64_t i = 0; i < x.length; ++i) {
    Pair* column = to + i / kTile * half * kTile + i % kTile;
    for (std::int64_t j = 0; j < half; ++j) std::memcpy(column + j * kTile, x.row(i) + 2 * j, sizeof(Pair));
  }
}

// scores [6, keys] = six rows of `left` times rows packed over their size; keys is a multiple of 16.
void multiply_keys(const Pair* left, const Pair* packed, std::int64_t half, std::int64_t keys, float* scores,
                   std::int64_t stride) {
  for (std::int64_t j = 0; j < keys; j += kTile)
    multiply<false>({left, half, 1}, packed + j * half, kTile, half, scores + j, stride,
                    (keys - j < kTile ? keys - j : kTile) / kLanes);
}

}  // namespace
}  // namespace llamahome

#endif
