// y = x W^T and the branches beside it, in bf16 on a CPU with AMX: results are written once, with what the grafts add.
//
// Every result is a sum in one order, which no other row and no other graft has a part in.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace {

using std::max, std::min;

constexpr int64_t CHUNK = 320;  // terms at a time: so many of a panel fit the first cache beside a block of x
constexpr int64_t ALONE = 1 << 20;  // multiply-adds below which one thread is enough

// What polygraft.kernels.dense.op sends, every field of 8 bytes.
struct Segment {
  int64_t start, stop, first, last;
  double scale;
};

struct Branch {  // A [R, in] and B [R, width], the latter for columns [column, column + width) of y
  const bf16 *A, *B;
  const Segment *segments;
  int64_t count, column, width, act;  // act: a place in ACTIVATIONS
};

struct Member {  // a projection: its first panel, and its columns of y
  int64_t panel, column, width;
};

// Rows [from, to) of a block of 16 rows that pass through a segment of a branch.
struct Item {
  const Branch *branch;
  const Segment *segment;
  int64_t from, to, ranks;
  size_t hidden;  // where scale * act(x A^T) lies, [16, ranks in whole tiles], zeros in the block's other rows
};

thread_local Space<bf16> hidden_space, flipped_space, right_space;
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
  const bf16 *P;
  bf16 *y;
  int64_t wide;
  const Branch *branches;
  int64_t beside;  // branches
  std::vector<Item> items;
  std::vector<int64_t> firsts;
  size_t size = 0;        // elements of all hidden values
  int64_t deepest = 0;    // tiles of the largest rank
  bf16 *hidden = nullptr;

  int64_t blocks() const { return tiles(rows, SIDE); }

  void list() {
    for (int64_t b = 0; b < blocks(); b++)
      for (const Branch *branch = branches; branch < branches + beside; branch++) {
        firsts.push_back(items.size());
        for (const Segment *s = branch->segments; s < branch->segments + branch->count; s++) {
          const int64_t from = max(s->start - b * SIDE, int64_t{0}), to = min(s->stop - b * SIDE, SIDE);
          const int64_t ranks = s->last - s->first, depth = tiles(ranks, DEPTH);
          if (from >= to || !ranks) continue;
          items.push_back({branch, s, from, to, ranks, size});
          size += depth * TILE;
          deepest = max(deepest, depth);
        }
      }
    firsts.push_back(items.size());
  }

  // scale * act(x A^T) of items [begin, end).
  void hide(int64_t begin, int64_t end, Tiles &shaped) const {
    bf16 *flipped = flipped_space.get(in * SIDE);
    int64_t last = -1;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = (std::upper_bound(firsts.begin(), firsts.end(), i) - firsts.begin() - 1) / beside;
      if (b != last) flip(x + b * SIDE * stride, stride, rows - b * SIDE, in / DEPTH, flipped);
      last = b;
      const int64_t depth = tiles(items[i].ranks, DEPTH);
      for (int64_t r = 0; r < depth * DEPTH; r += SIDE)
        hide_ranks(items[i], r, flipped, hidden + items[i].hidden + r, depth * DEPTH, shaped);
    }
  }

  // 16 ranks of an item from rank r on, zeros beyond its last; `to` has rows of `width`.
  void hide_ranks(const Item &item, int64_t r, const bf16 *flipped, bf16 *to, int64_t width, Tiles &shaped) const {
    const int64_t ranks = min(item.ranks - r, SIDE);
    __m512i t[SIDE];
    for (auto &row : t) row = _mm512_setzero_si512();
    if (ranks > 0) {
      alignas(64) float even[SIDE * SIDE], odd[SIDE * SIDE];  // two sums, so that one need not wait for the other
      const bf16 *A = item.branch->A + (item.segment->first + r) * in;
      shaped.shape(ranks);
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < in; k += 2 * DEPTH) {
        _tile_loadd(4, A + k, in * sizeof(bf16));
        _tile_loadd(5, flipped + k * SIDE, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (k + DEPTH == in) break;
        _tile_loadd(4, A + k + DEPTH, in * sizeof(bf16));
        _tile_loadd(6, flipped + k * SIDE + TILE, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      _tile_stored(0, even, 64);
      _tile_stored(1, odd, 64);
      for (int i = 0; i < ranks; i++)
        t[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_load_ps(even + i * SIDE), _mm512_load_ps(odd + i * SIDE)));
      transpose(t);
    }
    for (int i = 0; i < SIDE; i++) {
      __m512 h = i >= item.from && i < item.to ? _mm512_castsi512_ps(t[i]) : _mm512_setzero_ps();
      if (i >= item.from && i < item.to) h = activated(h, item.branch->act);
      h = _mm512_mul_ps(h, _mm512_set1_ps(static_cast<float>(item.segment->scale)));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i * width), (__m256i)_mm512_cvtneps_pbh(h));
    }
  }

  // Columns [column, column + width) of y, from panel p.
  void panel(int64_t p, int64_t column, int64_t width, Tiles &shaped) const {
    Right right{right_space.get(deepest * ACROSS * TILE)};
    float *kept = sums_space.get(blocks() * SIDE * PANEL);
    const int64_t chunk = blocks() > 1 ? CHUNK : in;
    for (int64_t k = 0; k < in; k += chunk)
      for (int64_t b = 0; b < blocks(); b++) {
        const int64_t valid = min(rows - b * SIDE, SIDE);
        float *sums = kept + b * SIDE * PANEL;
        shaped.shape(valid);
        k ? load(sums) : zero();
        multiply(x + b * SIDE * stride + k, stride, P + (p * in + k) * PANEL, min(chunk, in - k) / DEPTH);
        if (k + chunk < in) {
          store(sums);
          continue;
        }
        bool poisoned = false;
        each(b, column, [&](const Item &item) {
          const int64_t depth = tiles(item.ranks, DEPTH);
          right.hold(item, column, width);
          right.finite ? multiply(hidden + item.hidden, depth * DEPTH, right.tiles, depth) : void(poisoned = true);
        });
        store(sums);
        if (poisoned)
          each(b, column, [&](const Item &item) {
            right.hold(item, column, width);
            if (!right.finite) add_alone(item, right.tiles, width, sums);
          });
        round(sums, valid, width, y + b * SIDE * wide + column);
      }
  }

  void round(const float *sums, int64_t valid, int64_t width, bf16 *to) const {
    for (int64_t r = 0; r < valid; r++, sums += PANEL, to += wide)
      for (int64_t c = 0; c < PANEL; c += DEPTH) {
        const __m512 first = _mm512_load_ps(sums + c), second = _mm512_load_ps(sums + c + SIDE);
        _mm512_mask_storeu_epi16(to + c, below(width - c), (__m512i)_mm512_cvtne2ps_pbh(second, first));
      }
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

// Asks the kernel for the tiles; whether this process may use them.
extern "C" int ready() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

// x [rows, in] whose rows are `stride` apart, `in` a multiple of 32; y [rows, wide].
extern "C" void linear(const bf16 *x, int64_t stride, int64_t rows, int64_t in, const bf16 *P, const Member *members,
                       int64_t member_count, bf16 *y, int64_t wide, const Branch *branches, int64_t branch_count,
                       int64_t threads) {
  Product product{x, stride, rows, in, P, y, wide, branches, branch_count, {}, {}};
  product.list();
  product.hidden = hidden_space.get(product.size);
  const int64_t items = product.items.size();
  const int64_t panels = members[member_count - 1].panel + tiles(members[member_count - 1].width, PANEL);
#pragma omp parallel num_threads(rows * in * wide < ALONE ? 1 : threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    Tiles shaped;
    if (items) {
      product.hide(items * me / all, items * (me + 1) / all, shaped);
#pragma omp barrier
    }
    const Member *m = members;
    for (int64_t p = panels * me / all; p < panels * (me + 1) / all; p++) {
      while (p >= m->panel + tiles(m->width, PANEL)) m++;
      const int64_t within = (p - m->panel) * PANEL;
      product.panel(p, m->column + within, min(PANEL, m->width - within), shaped);
    }
  }
}
