// y = x W^T and the branches beside it, in bf16 on a CPU: results are written once, with what the grafts add.
//
// Every result is a sum in one order, which no other row and no other graft has a part in.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "operands.h"
#ifdef AMX
#include "amx.h"
#else
#include "avx512.h"
#endif

namespace {

using std::max, std::min;

constexpr int64_t CHUNK = 384;      // terms at a time: so many of a panel fit the first cache beside a block of x
constexpr int64_t ENOUGH = 8;       // blocks that are worth a thread's own reading of all packed weights
constexpr int64_t ALONE = 1 << 20;  // multiply-adds below which one thread is enough

// What polygraft.kernels.dense.op sends, every field of 8 bytes.
struct Segment {
  int64_t start, stop, first, last;
  double scale;
};

// A [R, depth] for columns [from, from + depth) of x, B [R, width] for columns [column, column + width) of y. With
// `kept` the values between them are written there: segment after segment [ranks, rows in whole tiles of terms]. With
// `gate`, which lies alike, they are 0 where it is.
struct Branch {
  const bf16 *A, *B;
  const Segment *segments;
  int64_t count, from, depth, column, width, act;  // act: a place in ACTIVATIONS
  bf16 *kept;
  const bf16 *gate;
};

struct Member {  // a projection: its first panel, and its columns of y
  int64_t panel, column, width;
};

enum Layout { PANELS, ROWS, COLUMNS };  // of weights: as Weights.packed has them, W [out, in], W^T [in, out]

// Rows [from, to) of a block of 16 rows that pass through a segment of a branch.
struct Item {
  const Branch *branch;
  const Segment *segment;
  int64_t block, from, to, ranks;
  size_t hidden;  // where scale * act(x A^T) lies, [16, ranks in whole tiles], zeros in the block's other rows
  int64_t kept;   // where the segment's values are kept
};

thread_local Space<bf16> hidden_space, flipped_space, right_space, panel_space;
thread_local Space<float> sums_space;

__m512 activated(__m512 h, int64_t act) {
  if (act == 0) return h;
  if (act == 1) return _mm512_max_ps(_mm512_setzero_ps(), h);  // in this order a NaN stays one
  alignas(64) float values[SIDE];
  _mm512_store_ps(values, h);
  for (float &v : values)
    v = act == 2 ? v * .5f * (1 + erff(v * 0.70710678f)) : act == 3 ? v / (1 + expf(-v)) : tanhf(v);
  return _mm512_load_ps(values);
}

float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rows of a segment in whole tiles of terms, and the elements of its kept values.
int64_t kept_rows(const Segment &s) { return tiles(s.stop - s.start, DEPTH) * DEPTH; }
int64_t kept_size(const Segment &s) { return kept_rows(s) * (s.last - s.first); }

// The ranks of B that are beside a panel, for the item that asked last.
struct Right {
  bf16 *tiles;
  const Item *held = nullptr;
  bool finite = true;

  void hold(const Item &item, int64_t column, int64_t width) {
    if (held && held->branch == item.branch && held->segment == item.segment) return;
    const Branch &own = *item.branch;
    const bf16 *B = own.B + item.segment->first * own.width + column - own.column;
    finite = interleave(B, own.width, item.ranks, width, tiles);
    held = &item;
  }
};

// One product; items of block b and branch j begin at firsts[b * beside + j].
struct Product {
  const bf16 *x;
  int64_t stride, rows, in;
  const bf16 *W;
  Layout layout;
  bf16 *y;
  int64_t wide;
  const Branch *branches;
  int64_t beside;  // branches
  std::vector<Item> items;
  std::vector<int64_t> firsts;
  size_t size = 0;      // elements of all hidden values
  int64_t deepest = 0;  // tiles of the largest rank
  bf16 *hidden = nullptr;

  int64_t blocks() const { return tiles(rows, SIDE); }

  void list() {
    for (int64_t b = 0; b < blocks(); b++)
      for (const Branch *branch = branches; branch < branches + beside; branch++) {
        firsts.push_back(items.size());
        int64_t place = 0;
        for (const Segment *s = branch->segments; s < branch->segments + branch->count; s++) {
          const int64_t from = max(s->start - b * SIDE, int64_t{0}), to = min(s->stop - b * SIDE, SIDE);
          const int64_t ranks = s->last - s->first, depth = tiles(ranks, DEPTH);
          if (from < to && ranks) {
            items.push_back({branch, s, b, from, to, ranks, size, place});
            size += depth * TILE;
            deepest = max(deepest, depth);
          }
          place += kept_size(*s);
        }
      }
    firsts.push_back(items.size());
  }

  // The values between A and B of items [begin, end).
  void hide(int64_t begin, int64_t end, Sums &sums) const {
    bf16 *flipped = flipped_space.get(in * SIDE);
    int64_t last = -1;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = items[i].block;
      if (b != last) flip(x + b * SIDE * stride, stride, rows - b * SIDE, in / DEPTH, flipped);
      last = b;
      const int64_t width = tiles(items[i].ranks, DEPTH) * DEPTH;
      for (int64_t r = 0; r < width; r += SIDE) {
        __m512i t[SIDE];
        for (auto &row : t) row = _mm512_setzero_si512();
        if (r < items[i].ranks) hide_ranks(items[i], r, flipped, sums, t);
        transpose(t);
        for (int64_t row = 0; row < SIDE; row++) {
          const auto values = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(t[row]));
          _mm256_storeu_si256(reinterpret_cast<__m256i *>(hidden + items[i].hidden + row * width + r), values);
        }
      }
    }
  }

  // Those of up to 16 ranks of an item from rank r on, a row of t for each; 0 outside its rows.
  void hide_ranks(const Item &item, int64_t r, const bf16 *flipped, Sums &sums, __m512i (&t)[SIDE]) const {
    const Branch &own = *item.branch;
    const int64_t ranks = min(item.ranks - r, SIDE), depth = own.depth;
    const bf16 *A = own.A + (item.segment->first + r) * depth, *right = flipped + own.from * SIDE;
    alignas(64) float products[SIDE * SIDE];
    sums.shape(ranks);
    sums.narrow(A, depth, right, depth / DEPTH, products);
    const __m512 scale = _mm512_set1_ps(static_cast<float>(item.segment->scale));
    const __mmask16 mine = below(item.to) & ~below(item.from);
    const int64_t terms = kept_rows(*item.segment), place = item.kept + item.block * SIDE - item.segment->start;
    for (int64_t i = 0; i < ranks; i++) {
      __m512 h = _mm512_maskz_mul_ps(mine, activated(_mm512_load_ps(products + i * SIDE), own.act), scale);
      if (own.gate) {
        const __m256i gate = _mm256_maskz_loadu_epi16(mine, own.gate + place + (r + i) * terms);
        h = _mm512_maskz_mov_ps(_mm256_test_epi16_mask(gate, _mm256_set1_epi16(0x7fff)), h);
      }
      if (own.kept) _mm256_mask_storeu_epi16(own.kept + place + (r + i) * terms, mine, (__m256i)_mm512_cvtneps_pbh(h));
      t[i] = _mm512_castps_si512(h);
    }
  }

  // Columns [column, column + width) of y, from panel p, for blocks [begin, end).
  void panel(int64_t p, int64_t column, int64_t width, int64_t begin, int64_t end, Sums &sums) const {
    Right right{right_space.get(deepest * ACROSS * TILE)};
    float *unfinished = sums_space.get(blocks() * SIDE * PANEL);
    const int64_t chunk = blocks() > 1 ? CHUNK : in;
    const bf16 *weights = layout == PANELS ? W + p * in * PANEL : unpacked(column, width);
    for (int64_t k = 0; k < in; k += chunk)
      for (int64_t b = begin; b < end; b++) {
        const int64_t valid = min(rows - b * SIDE, SIDE);
        float *results = unfinished + b * SIDE * PANEL;
        sums.shape(valid);
        k ? sums.load(results) : sums.zero();
        sums.multiply(x + b * SIDE * stride + k, stride, weights + k * PANEL, min(chunk, in - k) / DEPTH);
        if (k + chunk < in) {
          sums.store(results);
          continue;
        }
        bool poisoned = false;
        each(b, column, [&](const Item &item) {
          const int64_t depth = tiles(item.ranks, DEPTH);
          right.hold(item, column, width);
          right.finite ? sums.multiply(hidden + item.hidden, depth * DEPTH, right.tiles, depth) : void(poisoned = true);
        });
        sums.store(results);
        if (poisoned)
          each(b, column, [&](const Item &item) {
            right.hold(item, column, width);
            if (!right.finite) add_alone(item, right.tiles, width, results);
          });
        write(results, valid, width, y + b * SIDE * wide + column, wide, false);
      }
  }

  // A panel of weights that lie plain.
  const bf16 *unpacked(int64_t column, int64_t width) const {
    bf16 *panel = panel_space.get(in * PANEL);
    for (int64_t k = 0; k < in; k += DEPTH)
      if (layout == COLUMNS) {
        const bf16 *w = W + k * wide + column;
        for (int64_t r = 0; k + DEPTH < in && r < DEPTH; r++) {
          _mm_prefetch(w + (DEPTH + r) * wide, _MM_HINT_T0);
          _mm_prefetch(w + (DEPTH + r) * wide + DEPTH, _MM_HINT_T0);
        }
        interleave(w, wide, DEPTH, width, panel + k * PANEL);
      } else {
        const bf16 *w = W + column * in + k;
        for (int64_t r = 0; k + DEPTH < in && r < width; r++) _mm_prefetch(w + r * in + DEPTH, _MM_HINT_T0);
        for (int64_t c = 0; c < PANEL; c += SIDE) flip(w + c * in, in, width - c, 1, panel + k * PANEL + c * DEPTH);
      }
    return panel;
  }

  // The items of block b that are beside a column.
  template <typename Visit>
  void each(int64_t b, int64_t column, Visit visit) const {
    for (int64_t j = 0; j < beside; j++)
      if (branches[j].column <= column && column < branches[j].column + branches[j].width)
        for (int64_t i = firsts[b * beside + j]; i < firsts[b * beside + j + 1]; i++) visit(items[i]);
  }

  // An item's share where B is not finite: a foreign row's 0 times that would be NaN.
  void add_alone(const Item &item, const bf16 *right, int64_t width, float *sums) const {
    const int64_t stretch = tiles(item.ranks, DEPTH) * DEPTH;
    for (int64_t i = item.from; i < item.to; i++)
      for (int64_t c = 0; c < width; c++)
        for (int64_t r = 0; r < item.ranks; r++) {
          const bf16 *tile = right + (r / DEPTH * ACROSS + c / SIDE) * TILE;
          const bf16 b = tile[r % DEPTH / 2 * DEPTH + c % SIDE * 2 + r % 2];
          sums[i * PANEL + c] += widened(hidden[item.hidden + i * stretch + r]) * widened(b);
        }
  }
};

}  // namespace

// Whether this process may use what the library was built for.
extern "C" int ready() { return allowed(); }

// x [rows, in] whose rows are `stride` apart, `in` a multiple of 32; y [rows, wide]; then the branches.
struct Call {
  const bf16 *x;
  int64_t stride, rows, in;
  const bf16 *W;
  int64_t layout;
  const Member *members;
  int64_t member_count;
  bf16 *y;
  int64_t wide, beside, threads;
};

extern "C" void linear(const Call *call) {
  const auto &[x, stride, rows, in, W, layout, members, member_count, y, wide, beside, threads] = *call;
  const auto *branches = reinterpret_cast<const Branch *>(call + 1);
  Product product{x, stride, rows, in, W, static_cast<Layout>(layout), y, wide, branches, beside, {}, {}};
  product.list();
  product.hidden = hidden_space.get(product.size);
  const int64_t items = product.items.size();
  const int64_t panels = members[member_count - 1].panel + tiles(members[member_count - 1].width, PANEL);
  const int64_t used = rows * in * wide < ALONE ? 1 : threads;
#pragma omp parallel num_threads(used)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    Sums sums;
    // A thread has all panels for its part of the rows, and waits for nobody, or its part of the panels for all rows.
    const int64_t blocks = product.blocks();
    const bool apart = product.layout == PANELS && blocks >= ENOUGH * all;
    const int64_t begin = apart ? blocks * me / all : 0, end = apart ? blocks * (me + 1) / all : blocks;
    if (items && apart) {
      product.hide(product.firsts[begin * beside], product.firsts[end * beside], sums);
    } else if (items) {
      product.hide(items * me / all, items * (me + 1) / all, sums);
#pragma omp barrier
    }
    const int64_t first = apart ? 0 : panels * me / all, last = apart ? panels : panels * (me + 1) / all;
    const Member *m = call->members;
    for (int64_t p = first; p < last; p++) {
      while (p >= m->panel + tiles(m->width, PANEL)) m++;
      const int64_t within = (p - m->panel) * PANEL;
      product.panel(p, m->column + within, min(PANEL, m->width - within), begin, end, sums);
    }
  }
}

// out[s.first:s.last] (+)= h_s x_s for every segment: h its kept values [ranks, rows], x [rows, width], out [R, width].
extern "C" void outer(const bf16 *kept, const bf16 *x, int64_t stride, int64_t width, const Segment *segments,
                      int64_t count, bf16 *out, int64_t adds, int64_t threads) {
  int64_t terms = 0, work = 0;
  for (const Segment *s = segments; s < segments + count; s++) {
    terms = max(terms, kept_rows(*s));
    work += kept_size(*s) * width;
  }
  const int64_t panels = tiles(width, PANEL);
#pragma omp parallel num_threads(work < ALONE ? 1 : threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    Sums sums;
    bf16 *right = right_space.get(terms * PANEL);
    alignas(64) float results[SIDE * PANEL];
    for (int64_t p = panels * me / all; p < panels * (me + 1) / all; p++) {
      const int64_t column = p * PANEL, own = min(PANEL, width - column);
      const bf16 *h = kept;
      for (const Segment *s = segments; s < segments + count; h += kept_size(*s++)) {
        const int64_t ranks = s->last - s->first, rows = s->stop - s->start;
        if (!ranks || !rows) continue;
        interleave(x + s->start * stride + column, stride, rows, own, right);
        for (int64_t r = 0; r < ranks; r += SIDE) {
          const int64_t some = min(ranks - r, SIDE);
          sums.shape(some);
          sums.zero();
          sums.multiply(h + r * kept_rows(*s), kept_rows(*s), right, kept_rows(*s) / DEPTH);
          sums.store(results);
          write(results, some, own, out + (s->first + r) * width + column, width, adds);
        }
      }
    }
  }
}
