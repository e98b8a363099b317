// Attention of rows that continue cached sequences, straight over the blocks of their tables.
//
// A query's numbers are sums over its own sequence's positions, sixteen at a time from the tile of its first one on: no
// other row and no number of threads has a part in their order.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/rows.h"
#include "dense/operands.h"

// What polygraft.kernels.kv.paged sends, every field of 8 bytes.
struct Continued {  // batch rows [start, start + rows) after `before` cached positions
  int64_t start, rows, before;
};

// q and out rows of heads * head_dim, which are a stride apart; cache [blocks, block, 2, kv_heads * head_dim]; tables
// [count, table_stride]; of every sequence's positions the first `unseen` are not seen. Window and cap are 0 for none.
struct Paged {
  const void *q;
  void *out;
  float *sums;  // [rows, heads], or null
  const void *cache;
  const Continued *sequences;
  const int64_t *unseen, *tables;
  int64_t count, table_stride, q_stride, out_stride, rows, heads, kv_heads, head_dim, block, dtype, window;
  double scaling, cap;
  int64_t threads;
};

namespace {

using std::max, std::min;

constexpr int64_t TOGETHER = 16;  // queries of one key head that read a tile of keys together

struct Item {  // rows [first, last) of a sequence and a key head
  int64_t sequence, first, last, head;
};

thread_local Space<float> query_space, score_space, tile_space, sum_space;

template <typename T>
struct Attention {
  const Paged &c;
  int64_t width = c.kv_heads * c.head_dim, group = c.heads / c.kv_heads;
  int64_t depth = tiles(c.head_dim, LANES) * LANES;  // head_dim in whole vectors

  // Positions [from, to) that a query sees.
  int64_t to(const Item &item, int64_t row) const { return c.sequences[item.sequence].before + row + 1; }
  int64_t from(const Item &item, int64_t row) const {
    const int64_t unseen = c.unseen[item.sequence];
    return c.window ? max(unseen, to(item, row) - c.window) : unseen;
  }

  const T *cached(const Item &item, int64_t position, int64_t part) const {
    const int64_t block = c.tables[item.sequence * c.table_stride + position / c.block];
    return static_cast<const T *>(c.cache) + ((block * c.block + position % c.block) * 2 + part) * width +
           item.head * c.head_dim;
  }

  void item(const Item &item) const {
    const int64_t queries = (item.last - item.first) * group, start = c.sequences[item.sequence].start;
    const int64_t low = from(item, item.first) / LANES * LANES, high = to(item, item.last - 1);
    const int64_t span = tiles(high - low, LANES) * LANES;
    float *q = query_space.get(queries * depth), *scores = score_space.get(queries * span);
    float *tile = tile_space.get(LANES * depth), *sums = sum_space.get(queries * depth);
    for (int64_t i = 0; i < queries; i++) {
      const T *own = static_cast<const T *>(c.q) + (start + item.first + i / group) * c.q_stride +
                     (item.head * group + i % group) * c.head_dim;
      const __m512 scaling = _mm512_set1_ps(c.scaling);
      along(depth, [&](int64_t d, __mmask16) {
        store(q + i * depth + d, _mm512_mul_ps(load(own + d, lanes(c.head_dim - d)), scaling), 0xffff);
        store(sums + i * depth + d, _mm512_setzero_ps(), 0xffff);
      });
    }
    for (int64_t at = low; at < high; at += LANES) {
      keys(item, at, min(LANES, high - at), tile);
      for (int64_t i = 0; i < queries; i++) score(q + i * depth, tile, item, i, at, scores + i * span + at - low);
    }
    for (int64_t i = 0; i < queries; i++) weigh(item, i, scores + i * span, low);
    for (int64_t at = low; at < high; at += LANES) {
      const int64_t count = min(LANES, high - at);
      for (int64_t p = 0; p < count; p++) {
        const T *value = cached(item, at + p, 1);
        along(depth, [&](int64_t d, __mmask16) {
          store(tile + p * depth + d, load(value + d, lanes(c.head_dim - d)), 0xffff);
        });
      }
      for (int64_t i = 0; i < queries; i++) {
        const int64_t row = item.first + i / group;
        const int64_t begin = max(from(item, row) - at, int64_t{0}), end = min(to(item, row) - at, count);
        add(scores + i * span + at - low, tile, begin, end, sums + i * depth);
      }
    }
    for (int64_t i = 0; i < queries; i++) {
      T *own = static_cast<T *>(c.out) + (start + item.first + i / group) * c.out_stride +
               (item.head * group + i % group) * c.head_dim;
      along(c.head_dim, [&](int64_t d, __mmask16 m) { store(own + d, load(sums + i * depth + d, m), m); });
    }
  }

  // The keys of `count` positions with a position in each lane, [depth, 16]; zeros in the other lanes.
  void keys(const Item &item, int64_t at, int64_t count, float *tile) const {
    const T *rows[LANES];
    for (int64_t p = 0; p < count; p++) rows[p] = cached(item, at + p, 0);
    for (int64_t d = 0; d < depth; d += LANES) {
      const __mmask16 m = lanes(c.head_dim - d);
      __m512i t[SIDE];
      for (int64_t p = 0; p < LANES; p++)
        t[p] = p < count ? _mm512_castps_si512(load(rows[p] + d, m)) : _mm512_setzero_si512();
      transpose(t);
      for (int64_t p = 0; p < LANES; p++) _mm512_store_si512(tile + (d + p) * LANES, t[p]);
    }
  }

  // Those of a tile for a query: -inf where it does not see.
  void score(const float *q, const float *tile, const Item &item, int64_t i, int64_t at, float *to_scores) const {
    __m512 parts[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t d = 0; d < depth; d += 4)
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; j++)
        parts[j] = _mm512_fmadd_ps(_mm512_set1_ps(q[d + j]), _mm512_load_ps(tile + (d + j) * LANES), parts[j]);
    const __m512 all = _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
    _mm512_store_ps(to_scores, all);
    if (c.cap)
      for (int64_t p = 0; p < LANES; p++)
        to_scores[p] = static_cast<float>(c.cap) * tanhf(to_scores[p] / static_cast<float>(c.cap));
    const int64_t row = item.first + i / group;
    const __mmask16 seen = lanes(to(item, row) - at) & ~lanes(from(item, row) - at);
    _mm512_mask_store_ps(to_scores, ~seen, _mm512_set1_ps(-INFINITY));
  }

  // A query's softmax over its scores, and the log of its sum where that is asked for.
  void weigh(const Item &item, int64_t i, float *scores, int64_t low) const {
    const int64_t row = item.first + i / group;
    const int64_t begin = from(item, row) / LANES * LANES - low, end = to(item, row) - low;
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t p = begin; p < end; p += LANES) most = _mm512_max_ps(most, _mm512_load_ps(scores + p));
    const float peak = _mm512_reduce_max_ps(most);
    for (int64_t p = begin; p < end; p += LANES) {
      const __m512 e = exponential(_mm512_sub_ps(_mm512_load_ps(scores + p), _mm512_set1_ps(peak)));
      total = _mm512_add_ps(total, e);
      _mm512_store_ps(scores + p, e);
    }
    const float sum = _mm512_reduce_add_ps(total);
    for (int64_t p = begin; p < end; p += LANES)
      _mm512_store_ps(scores + p, _mm512_div_ps(_mm512_load_ps(scores + p), _mm512_set1_ps(sum)));
    if (c.sums)
      c.sums[(c.sequences[item.sequence].start + row) * c.heads + item.head * group + i % group] = peak + logf(sum);
  }

  // Adds the weighted values of a tile's positions [begin, end).
  void add(const float *weights, const float *tile, int64_t begin, int64_t end, float *sums) const {
    for (int64_t d = 0; d < depth; d += 4 * LANES) {
      const int64_t some = min((depth - d) / LANES, int64_t{4});
      __m512 s[4];
      for (int64_t j = 0; j < some; j++) s[j] = _mm512_load_ps(sums + d + j * LANES);
      for (int64_t p = begin; p < end; p++) {
        const __m512 weight = _mm512_set1_ps(weights[p]);
        for (int64_t j = 0; j < some; j++)
          s[j] = _mm512_fmadd_ps(weight, _mm512_load_ps(tile + p * depth + d + j * LANES), s[j]);
      }
      for (int64_t j = 0; j < some; j++) _mm512_store_ps(sums + d + j * LANES, s[j]);
    }
  }

  // Rows of no sequence.
  void clear() const {
    std::vector<char> mine(c.rows, 0);
    for (const Continued *s = c.sequences; s < c.sequences + c.count; s++)
      std::fill_n(mine.begin() + s->start, s->rows, 1);
    for (int64_t row = 0; row < c.rows; row++)
      if (!mine[row]) {
        std::fill_n(static_cast<T *>(c.out) + row * c.out_stride, c.heads * c.head_dim, T{0});
        if (c.sums) std::fill_n(c.sums + row * c.heads, c.heads, -INFINITY);
      }
  }

  void run() const {
    clear();
    std::vector<Item> items;
    const int64_t step = max(TOGETHER / group, int64_t{1});
    for (int64_t s = 0; s < c.count; s++)
      for (int64_t first = 0; first < c.sequences[s].rows; first += step)
        for (int64_t head = 0; head < c.kv_heads; head++)
          items.push_back({s, first, min(first + step, c.sequences[s].rows), head});
    const int64_t count = items.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(count == 1 ? 1 : c.threads)
    for (int64_t i = 0; i < count; i++) item(items[i]);
  }
};

}  // namespace

extern "C" int64_t size_of_paged() { return sizeof(Paged); }

extern "C" void paged(const Paged *c) {
  of_dtype(c->dtype, [&](auto t) { Attention<decltype(t)>{*c}.run(); });
}
