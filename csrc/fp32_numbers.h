// The numbers of tiles.h in fp32, each a unit of its own.
//
// Include it last before tiles.h, and only in a .cpp file all of whose later functions may need AVX-512: it sets the
// target, so that the build needs no flag and no inline function of another header is compiled for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLAMAHOME_AVX512
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace llamahome {
namespace {

struct Numbers {
  using Element = float;
  using Unit = float;
  using Lanes = __m512;  // 16 numbers
  using Units = __m512;
  static constexpr std::int64_t kPerUnit = 1;

  static Units load(const Unit* x) { return _mm512_load_ps(x); }
  static Units broadcast(Unit x) { return _mm512_set1_ps(x); }
  static __m512 add_product(__m512 sum, Units a, Units b) { return _mm512_fmadd_ps(a, b, sum); }

  static Lanes zeros() { return _mm512_setzero_ps(); }
  static Lanes read(const Element* x) { return _mm512_loadu_ps(x); }
  static void write(Element* to, Lanes x) { _mm512_storeu_ps(to, x); }
  static Lanes narrow(__m512 x) { return x; }
  static __m512 widen(const Element* x) { return read(x); }
  static void join(Unit* to, const Lanes* rows) { _mm512_store_ps(to, rows[0]); }
};

}  // namespace
}  // namespace llamahome

#endif
