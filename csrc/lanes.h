// Sixteen numbers at a time. Include it after bf16_numbers.h or fp32_numbers.h, which set the target.
#pragma once

namespace llamahome {
namespace {

constexpr std::int64_t kLanes = 16;

// The lanes of the 16 columns from `column` that are below `limit`.
inline __mmask16 below(std::int64_t limit, std::int64_t column) {
  const std::int64_t count = limit - column;
  return count >= kLanes ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>(count <= 0 ? 0 : (1 << count) - 1);
}

// e^x for x <= 0, the last bit or two of it apart: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
inline __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.f / 720);
  constexpr float kCoefficients[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (const float c : kCoefficients) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

}  // namespace
}  // namespace llamahome
