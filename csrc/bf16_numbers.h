// The numbers of tiles.h in bf16: two neighbours make a unit, which vdpbf16ps multiplies at once.
//
// Include it last before tiles.h, and only in a .cpp file all of whose later functions may need AVX512-BF16: it sets
// the target, so that the build needs no flag and no inline function of another header is compiled for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLAMAHOME_AVX512
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace llamahome {
namespace {

struct Numbers {
  using Element = std::uint16_t;  // its bits
  using Unit = std::uint32_t;     // two neighbours, the first in the low half
  using Lanes = __m256i;          // 16 numbers
  using Units = __m512bh;         // 16 units
  static constexpr std::int64_t kPerUnit = 2;

  static Units load(const Unit* x) { return reinterpret_cast<Units>(_mm512_load_si512(x)); }
  static Units broadcast(Unit x) { return reinterpret_cast<Units>(_mm512_set1_epi32(static_cast<int>(x))); }
  static __m512 add_product(__m512 sum, Units a, Units b) { return _mm512_dpbf16_ps(sum, a, b); }

  static Lanes zeros() { return _mm256_setzero_si256(); }
  static Lanes read(const Element* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static void write(Element* to, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
  static Lanes narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
  static __m512 widen(const Element* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read(x)), 16));
  }
  // One number of each of `kPerUnit` rows to a unit.
  static void join(Unit* to, const Lanes* rows) {
    const __m512i first = _mm512_cvtepu16_epi32(rows[0]), second = _mm512_cvtepu16_epi32(rows[1]);
    _mm512_store_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
};

}  // namespace
}  // namespace llamahome

#endif
