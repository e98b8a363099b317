// Rows of bf16 or float32, sixteen numbers at a time and computed with in float32.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace {

using bf16 = uint16_t;

constexpr int64_t LANES = 16;
enum Dtype : int64_t { BF16, FLOAT32 };  // as polygraft.kernels.compiled.calls numbers them

__mmask16 lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// x as bf16 has it, in the upper halves: to nearest, ties to even, as torch rounds (subnormal numbers stay).
__m512i rounded_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(~0), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), up);
}

template <typename T>
__m512 rounded(__m512 x) {
  if constexpr (sizeof(T) == 4) return x;
  return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(x), _mm512_set1_epi32(0xffff0000)));
}

// A mask of all lanes is none: a store through one takes many times as long.
constexpr __mmask16 ALL = 0xffff;

__m512 load(const bf16 *from, __mmask16 m) {
  const __m256i x = m == ALL ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(m, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

__m512 load(const float *from, __mmask16 m) { return m == ALL ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(m, from); }

void store(bf16 *to, __m512 x, __mmask16 m) {
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16));
  m == ALL ? _mm256_storeu_si256((__m256i *)to, halves) : _mm256_mask_storeu_epi16(to, m, halves);
}

void store(float *to, __m512 x, __mmask16 m) { m == ALL ? _mm512_storeu_ps(to, x) : _mm512_mask_storeu_ps(to, m, x); }

// e^x within two units in the last place; 0 below -104, infinite above 89, and a NaN stays one.
__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(89.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));  // in this order, for a NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, n);
}

// Calls `visit(first, mask)` for sixteen numbers after sixteen of a row.
template <typename Visit>
void along(int64_t width, Visit visit) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) visit(i, ALL);
  if (i < width) visit(i, lanes(width - i));
}

// Calls `visit` with an element of the dtype, so that it is written once for all.
template <typename Visit>
void of_dtype(int64_t dtype, Visit visit) {
  dtype == BF16 ? visit(bf16{}) : visit(float{});
}

}  // namespace
