// Sums of a block of up to 16 rows by a panel, by AVX-512's products of pairs; they lie in the first cache.

#pragma once

#include <cstring>

#include "operands.h"

namespace {

bool allowed() { return true; }

class Sums {
 public:
  void shape(int64_t rows) { rows_ = rows; }

  void zero() { memset(held_, 0, sizeof held_); }

  void load(const float *from) { memcpy(held_, from, rows_ * PANEL * sizeof(float)); }

  void store(float *to) const { memcpy(to, held_, rows_ * PANEL * sizeof(float)); }

  // Adds `depth` tiles of a left operand, whose rows are `stride` apart, times right ones, four for each.
  void multiply(const bf16 *left, int64_t stride, const bf16 *right, int64_t depth) {
    int64_t row = 0;
    for (; row + 4 <= rows_; row += 4) add<4, ACROSS>(left + row * stride, stride, right, depth, held_ + row * PANEL);
    for (; row < rows_; row++) add<1, ACROSS>(left + row * stride, stride, right, depth, held_ + row * PANEL);
  }

  // The product of such a left operand and right ones, one for each, to [16, 16].
  void narrow(const bf16 *left, int64_t stride, const bf16 *right, int64_t depth, float *to) {
    memset(to, 0, rows_ * SIDE * sizeof(float));
    int64_t row = 0;
    for (; row + 8 <= rows_; row += 8) add<8, 1>(left + row * stride, stride, right, depth, to + row * SIDE);
    for (; row < rows_; row++) add<1, 1>(left + row * stride, stride, right, depth, to + row * SIDE);
  }

 private:
  // R rows by C tiles of columns, whose sums stay in registers meanwhile.
  template <int R, int C>
  static void add(const bf16 *left, int64_t stride, const bf16 *right, int64_t depth, float *sums) {
    __m512 s[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) s[r][c] = _mm512_loadu_ps(sums + (r * C + c) * SIDE);
    for (int64_t k = 0; k < depth; k++, left += DEPTH, right += C * TILE)
      for (int64_t pair = 0; pair < SIDE; pair++) {
        __m512bh b[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) b[c] = (__m512bh)_mm512_load_si512(right + c * TILE + pair * 2 * SIDE);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          int32_t both;
          memcpy(&both, left + r * stride + pair * 2, sizeof both);
          const auto a = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], a, b[c]);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) _mm512_storeu_ps(sums + (r * C + c) * SIDE, s[r][c]);
  }

  alignas(64) float held_[SIDE * PANEL];
  int64_t rows_ = 0;
};

}  // namespace
