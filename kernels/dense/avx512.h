// Sums of blocks of up to 16 rows by a panel, by AVX-512's products of pairs.
//
// Eight rows by two tiles are 16 sums in registers, enough to wait for none of them; all terms are added before they are
// stored, and nothing but an item's own rows is multiplied with its B.

#pragma once

#include <array>

#include "branches.h"

namespace {

constexpr int64_t PARTS = 2;                // of a panel, which threads may share
constexpr int64_t ROWS = 8, STRIP = 2;      // rows and tiles at a time
constexpr int64_t NARROW = 4;               // rows that take all of a panel's tiles at a time

bool allowed() { return true; }

int64_t terms_at_a_time(int64_t in, int64_t) { return in; }

// An item's ranks of B beside a panel.
struct Ranks {
  bf16 *tiles;

  void take(const bf16 *B, int64_t stride, int64_t ranks, int64_t width) {
    interleave(B, stride, ranks, width, ::tiles(ranks, 2), tiles);
    for (const bf16 *row = B + PANEL; row < B + PANEL + ranks * stride; row += stride) {  // for the next panel
      _mm_prefetch(row, _MM_HINT_T1);
      _mm_prefetch(row + DEPTH, _MM_HINT_T1);
    }
  }
};

class Sums {
 public:
  // Sums of `rows` rows by the first `across` tiles of a panel, [16, PANEL], begin at 0 or go on.
  void open(float *sums, int64_t rows, int64_t across, bool resumes) {
    sums_ = sums, rows_ = rows, across_ = across, loaded_ = resumes ? ~0 : 0;
  }

  void close() {}

  // Adds rows of a left operand, `stride` apart, times `pairs` pairs of terms of right ones, of which those `ahead`
  // elements further on will be wanted.
  void multiply(const bf16 *left, int64_t stride, const bf16 *right, int64_t pairs, int64_t ahead = 0) {
    add_rows(0, rows_, left, stride, right, pairs, ahead);
    loaded_ = ~0;
  }

  // Adds an item's hidden values times its ranks of B.
  void add(const Item &item, const bf16 *hidden, const Ranks &ranks) const {
    const int64_t stride = item.hidden_stride();
    add_rows(item.from, item.to, hidden + item.from * stride, stride, ranks.tiles, tiles(item.ranks, 2), 0);
  }

 private:
  using Add = void(const bf16 *, int64_t, const bf16 *, int64_t, float *, __mmask16, int64_t);

  // Where rows are added in two turns, each fetches one tile of a strip, so that what is wanted comes evenly.
  void add_rows(int64_t from, int64_t to, const bf16 *left, int64_t stride, const bf16 *right, int64_t pairs,
                int64_t ahead) const {
    const bool all = across_ == ACROSS && to - from <= NARROW;
    for (int64_t c = 0; c < across_; c += all ? ACROSS : STRIP)
      for (int64_t row = from; row < to; row += ROWS) {
        const auto fetched = !ahead ? 0 : to - from <= ROWS ? 3 : row == from ? 1 : 2;
        const int64_t rows = std::min(to - row, ROWS);
        Add *add = all ? panel[fetched > 0][rows - 1] : strip[fetched][rows - 1];
        add(left + (row - from) * stride, stride, right + c * TILE, pairs, sums_ + row * PANEL + c * SIDE, loaded_,
            ahead);
      }
  }

  template <int R, int C, int FETCHED>
  static void add(const bf16 *left, int64_t stride, const bf16 *right, int64_t pairs, float *sums, __mmask16 loaded,
                  int64_t ahead) {
    __m512 s[R][C];
    const bf16 *row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      row[r] = left + r * stride;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) s[r][c] = _mm512_maskz_load_ps(loaded, sums + r * PANEL + c * SIDE);
    }
    const auto add_pair = [&](int64_t pair) __attribute__((always_inline)) {
      __m512bh b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const bf16 *from = right + c * TILE + pair * DEPTH;
        b[c] = (__m512bh)_mm512_load_si512(from);
        if (FETCHED >> c & 1) _mm_prefetch(from + ahead, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t both;
        memcpy(&both, row[r] + pair * 2, sizeof both);
        const auto a = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], a, b[c]);
      }
    };
    for (; pairs >= SIDE; pairs -= SIDE, right += ACROSS * TILE) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) asm("" : "+r"(row[r]));  // else gcc computes them anew from few, and spills
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < SIDE; pair++) add_pair(pair);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) row[r] += DEPTH;
    }
    for (int64_t pair = 0; pair < pairs; pair++) add_pair(pair);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) _mm512_store_ps(sums + r * PANEL + c * SIDE, s[r][c]);
  }

  // By what is fetched, a bit for each tile, and by the number of rows.
  static constexpr Add *panel[2][NARROW] = {
      {add<1, ACROSS, 0>, add<2, ACROSS, 0>, add<3, ACROSS, 0>, add<4, ACROSS, 0>},
      {add<1, ACROSS, ~0>, add<2, ACROSS, ~0>, add<3, ACROSS, ~0>, add<4, ACROSS, ~0>},
  };
  template <int FETCHED>
  static constexpr std::array<Add *, ROWS> of_strip = {
      add<1, STRIP, FETCHED>, add<2, STRIP, FETCHED>, add<3, STRIP, FETCHED>, add<4, STRIP, FETCHED>,
      add<5, STRIP, FETCHED>, add<6, STRIP, FETCHED>, add<7, STRIP, FETCHED>, add<8, STRIP, FETCHED>};
  static constexpr std::array<Add *, ROWS> strip[] = {of_strip<0>, of_strip<1>, of_strip<2>, of_strip<3>};

  float *sums_ = nullptr;
  int64_t rows_ = 0, across_ = 0;
  __mmask16 loaded_ = 0;
};

// The sum of each of 16 vectors, in one order for all.
__m512 sums_of(const __m512 (&v)[SIDE]) {
  __m512 pairs[SIDE / 2], fours[SIDE / 4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < SIDE / 2; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < SIDE / 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

// The values between A and B of items of x [rows, in], whose rows are `stride` apart, to `hidden`.
class Projection {
 public:
  Projection(const bf16 *x, int64_t stride, int64_t, int64_t, bf16 *hidden) : x_(x), stride_(stride), hidden_(hidden) {}

  void project_down(const Item &item, const Sums &) const {
    const bool plain = !item.branch->kept && !item.branch->mask;
    for (int64_t r = 0; r < item.ranks; r += SIDE) {
      alignas(64) float products[SIDE * SIDE];  // [rows, ranks]
      multiply(item, r, products);
      if (plain) {
        const __mmask16 ranks = below(item.ranks - r);
        for (int64_t row = item.from; row < item.to; row++)
          write_hidden(hidden_ + item.hidden + row * item.hidden_stride() + r,
                       _mm512_maskz_mov_ps(ranks, scaled(item, _mm512_load_ps(products + row * SIDE))));
        continue;
      }
      __m512i t[SIDE];
      for (int64_t row = 0; row < SIDE; row++)
        t[row] = row >= item.from && row < item.to ? _mm512_load_si512(products + row * SIDE) : _mm512_setzero_si512();
      transpose(t);
      finish(item, r, t, hidden_);
    }
  }

 private:
  // The products of an item's rows with ranks from r on, each in its own place in [16, 16].
  void multiply(const Item &item, int64_t r, float *products) const {
    const bf16 *x = x_ + item.block * SIDE * stride_ + item.branch->from;
    for (int64_t row = item.from; row < item.to;) {
      const int64_t rows = item.to - row;
      if (rows > 2)
        for (int64_t i = 0; i < std::min(item.ranks - r, SIDE); i += 4) dots<4>(item, x, row, r, i, products);
      else if (rows == 2)
        for (int64_t i = 0; i < std::min(item.ranks - r, SIDE); i += 8) dots<2>(item, x, row, r, i, products);
      else
        dots<1>(item, x, row, r, 0, products);
      row += rows > 2 ? 4 : rows;
    }
  }

  // Those of R rows from `row` on and 16 / R ranks from r + i on: 16 sums of 32 terms at a time. Beyond the last of
  // either it is computed again, and not written.
  template <int R>
  void dots(const Item &item, const bf16 *x, int64_t row, int64_t r, int64_t i, float *products) const {
    constexpr int RANKS = SIDE / R;
    const int64_t ahead = SIDE * item.branch->depth;  // the next ranks, or the next graft's
    const bf16 *a[RANKS], *b[R];
#pragma GCC unroll 16
    for (int j = 0; j < RANKS; j++) a[j] = item.A(std::min(r + i + j, item.ranks - 1));
#pragma GCC unroll 4
    for (int j = 0; j < R; j++) b[j] = x + std::min(row + j, item.to - 1) * stride_;
    __m512 s[SIDE];
#pragma GCC unroll 16
    for (auto &v : s) v = _mm512_setzero_ps();
    for (int64_t k = 0; k < item.branch->depth; k += DEPTH) {
      __m512bh rows[R];
#pragma GCC unroll 4
      for (int j = 0; j < R; j++) rows[j] = (__m512bh)_mm512_loadu_si512(b[j] + k);
#pragma GCC unroll 16
      for (int rank = 0; rank < RANKS; rank++) {
        const auto weights = (__m512bh)_mm512_loadu_si512(a[rank] + k);
        _mm_prefetch(a[rank] + k + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int j = 0; j < R; j++) s[j * RANKS + rank] = _mm512_dpbf16_ps(s[j * RANKS + rank], rows[j], weights);
      }
    }
    const __m512 found = sums_of(s);
    for (int64_t j = 0; j < std::min<int64_t>(R, item.to - row); j++)
      _mm512_mask_storeu_ps(products + (row + j) * SIDE + i - j * RANKS, ((1 << RANKS) - 1) << j * RANKS, found);
  }

  const bf16 *x_;
  int64_t stride_;
  bf16 *hidden_;
};

}  // namespace
