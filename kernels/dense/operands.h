// The operands of products, memory for them, and what becomes of the sums.
//
// They come in tiles of 16 rows of 64 bytes, as AMX has them; a product of two sums 32 terms. Its left operand is 16 rows
// of 32 terms as they lie in memory; its right one is 16 pairs of terms by 16 columns.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

using bf16 = uint16_t;

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows, terms and elements of a tile
constexpr int64_t ACROSS = 4, PANEL = ACROSS * SIDE;           // tiles and columns of a panel

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

__mmask32 below(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// Memory that a thread keeps from call to call.
template <typename T>
class Scratch {
 public:
  T *get(size_t elements) {
    if (elements > size_) {
      size_ = elements;
      memory_.reset(static_cast<T *>(aligned_alloc(64, tiles(elements * sizeof(T), 64) * 64)));
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void *p) const { free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t size_ = 0;
};

// t[i][j] <-> t[j][i], of 32 bits each.
void transpose(__m512i (&t)[SIDE]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int s = 1; s < SIDE; s *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
    const __m512i even = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(SIDE - s));
    const __m512i other = _mm512_add_epi32(even, _mm512_set1_epi32(s));
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++)
      if (!(i & s)) {
        const __m512i low = t[i], high = t[i + s];
        t[i] = _mm512_permutex2var_epi32(low, even, high);
        t[i + s] = _mm512_permutex2var_epi32(low, other, high);
      }
  }
}

// Right operands whose columns are up to 16 rows of x, zeros beyond `count`.
void transpose_tiles(const bf16 *x, int64_t stride, int64_t count, int64_t depth, bf16 *to) {
  for (int64_t k = 0; k < depth; k++) {
    __m512i t[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++)
      t[i] = i < count ? _mm512_loadu_si512(x + i * stride + k * DEPTH) : _mm512_setzero_si512();
    transpose(t);
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + k * TILE + i * DEPTH, t[i]);
  }
}

// Right operands of `width` columns of B and `pairs` pairs of its rows, a panel's tiles for every 32 rows; zeros beyond.
void interleave(const bf16 *B, int64_t stride, int64_t rows, int64_t width, int64_t pairs, bf16 *to) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  // A pair of 16 bits: column c of one row, and (32 on) column c of the next.
  const __m512i left = _mm512_or_epi32(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
  const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(0x100010));
  const __m512i none = _mm512_setzero_si512();
  for (int64_t p = 0; p < pairs; p++)
    for (int64_t half = 0; half < ACROSS / 2; half++) {
      const __mmask32 valid = below(width - half * DEPTH);
      const bf16 *row = B + 2 * p * stride + half * DEPTH;
      const __m512i one = 2 * p < rows ? _mm512_maskz_loadu_epi16(valid, row) : none;
      const __m512i two = 2 * p + 1 < rows ? _mm512_maskz_loadu_epi16(valid, row + stride) : none;
      bf16 *pair = to + (p / SIDE * ACROSS + half * 2) * TILE + p % SIDE * DEPTH;
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(one, left, two));
      _mm512_store_si512(pair + TILE, _mm512_permutex2var_epi16(one, right, two));
    }
}

__m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The first `count` rows and `width` columns of sums, rounded, to rows that are `stride` apart; or their sum with those.
void write(const float *sums, int64_t count, int64_t width, bf16 *to, int64_t stride, bool adds) {
  for (int64_t r = 0; r < count; r++, sums += PANEL, to += stride)
    for (int64_t c = 0; c < width; c += DEPTH) {
      const __mmask32 valid = below(width - c);
      __m512 first = _mm512_load_ps(sums + c), second = _mm512_load_ps(sums + c + SIDE);
      if (adds) {
        const __m512i before = _mm512_maskz_loadu_epi16(valid, to + c);
        first = _mm512_add_ps(first, widened(_mm512_castsi512_si256(before)));
        second = _mm512_add_ps(second, widened(_mm512_extracti64x4_epi64(before, 1)));
      }
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      width - c >= DEPTH ? _mm512_storeu_si512(to + c, rounded) : _mm512_mask_storeu_epi16(to + c, valid, rounded);
    }
}

}  // namespace
