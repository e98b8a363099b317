// Branches as polygraft.kernels.dense.op sends them, and the values between their A and B.

#pragma once

#include <algorithm>
#include <cmath>

#include "operands.h"

namespace {

struct Segment {
  int64_t start, stop, first, last;
  double scale;
};

// A [R, depth] for columns [from, from + depth) of x, B [R, width] for columns [column, column + width) of y. With
// `kept` the values between them are written there: segment after segment [ranks, rows in whole tiles of terms]. With
// `mask`, which lies alike, they are 0 where it is.
struct Branch {
  const bf16 *A, *B;
  const Segment *segments;
  int64_t count, from, depth, column, width, act;  // act: a place in ACTIVATIONS
  bf16 *kept;
  const bf16 *mask;
};

// Rows of a segment in whole tiles of terms, and the elements of its kept values.
int64_t kept_rows(const Segment &s) { return tiles(s.stop - s.start, DEPTH) * DEPTH; }
int64_t kept_size(const Segment &s) { return kept_rows(s) * (s.last - s.first); }

// Rows [from, to) of a block of 16 rows that pass through a segment of a branch.
struct Item {
  const Branch *branch;
  const Segment *segment;
  int64_t block, from, to, ranks;
  size_t hidden;  // where scale * act(x A^T) lies, [16, hidden_stride()]
  int64_t kept;   // where the segment's values are kept

  int64_t hidden_stride() const { return tiles(ranks, DEPTH) * DEPTH; }
  const bf16 *A(int64_t rank) const { return branch->A + (segment->first + rank) * branch->depth; }
};

__m512 activated(__m512 h, int64_t act) {
  if (act == 0) return h;
  if (act == 1) return _mm512_max_ps(_mm512_setzero_ps(), h);  // in this order a NaN stays one
  alignas(64) float values[SIDE];
  _mm512_store_ps(values, h);
  for (float &v : values)
    v = act == 2 ? v * .5f * (1 + erff(v * 0.70710678f)) : act == 3 ? v / (1 + expf(-v)) : tanhf(v);
  return _mm512_load_ps(values);
}

// scale * act of products x A^T that are an item's.
__m512 scaled(const Item &item, __m512 products) {
  return _mm512_mul_ps(activated(products, item.branch->act), _mm512_set1_ps(static_cast<float>(item.segment->scale)));
}

void write_hidden(bf16 *to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// Writes the hidden values of an item's ranks [r, r + 16) to `hidden`, zeros in the block's other rows and beyond its
// ranks, and keeps and masks them; t has a rank's products with the block's rows in each row.
void finish(const Item &item, int64_t r, __m512i (&t)[SIDE], bf16 *hidden) {
  const Branch &branch = *item.branch;
  const __mmask16 own = below(item.to) & ~below(item.from);
  const int64_t terms = kept_rows(*item.segment), place = item.kept + item.block * SIDE - item.segment->start;
  for (int64_t i = 0; i < SIDE; i++) {
    if (r + i >= item.ranks) {
      t[i] = _mm512_setzero_si512();
      continue;
    }
    __m512 h = _mm512_maskz_mov_ps(own, scaled(item, _mm512_castsi512_ps(t[i])));
    if (branch.mask) {
      const __m256i mask = _mm256_maskz_loadu_epi16(own, branch.mask + place + (r + i) * terms);
      h = _mm512_maskz_mov_ps(_mm256_test_epi16_mask(mask, _mm256_set1_epi16(0x7fff)), h);
    }
    if (branch.kept) _mm256_mask_storeu_epi16(branch.kept + place + (r + i) * terms, own, (__m256i)_mm512_cvtneps_pbh(h));
    t[i] = _mm512_castps_si512(h);
  }
  transpose(t);
  for (int64_t row = 0; row < SIDE; row++)
    write_hidden(hidden + item.hidden + row * item.hidden_stride() + r, _mm512_castsi512_ps(t[row]));
}

}  // namespace
