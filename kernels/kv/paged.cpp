// Attention of rows that continue cached sequences, straight over the blocks of their tables.
//
// A query's numbers are sums over its own sequence's positions, sixteen at a time from the tile of its first one on: no
// other row and no number of threads has a part in their order.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/rows.h"
#include "dense/operands.h"

// What polygraft.kernels.kv.paged sends, every field of 8 bytes.
struct Continued {  // batch rows [start, start + rows) after `before` cached positions
  int64_t start, rows, before;
};

// The sequences of a forward, which all its layers read: `tables` [count, table_stride]; of every sequence's positions the
// first `unseen` [layers, count] are not seen, alike in all layers where the stride is 0.
struct Pages {
  const Continued *sequences;
  const int64_t *tables, *unseen;
  int64_t count, table_stride, unseen_stride;
};

// q and out rows of heads * head_dim, which are a stride apart; cache [blocks, block, 2, kv_heads * head_dim]. Window and
// cap are 0 for none.
struct Paged {
  const void *q;
  void *out;
  float *sums;  // [rows, heads], or null
  const void *cache;
  const Pages *pages;
  int64_t layer, q_stride, out_stride, rows, heads, kv_heads, head_dim, block, dtype, window;
  double scaling, cap;
  int64_t threads;
};

namespace {

using std::max, std::min;

constexpr int64_t TOGETHER = 16;  // queries of one key head that read a tile of keys together
constexpr int64_t AT_ONCE = 4;    // of them, those whose sums are in registers at a time
constexpr int64_t READ = 1 << 17;  // bytes of keys and values that are read before they are used

struct Item {  // rows [first, last) of a sequence and key heads [head, end)
  int64_t sequence, first, last, head, end;
};

thread_local Scratch<uint32_t> query_scratch, key_scratch;
thread_local Scratch<float> score_scratch, sum_scratch;

// A word is what is multiplied at a time: one number of float32, two of bf16.
__m512 add_product(__m512 sums, __m512i query, __m512i keys, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(query), _mm512_castsi512_ps(keys), sums);
}
__m512 add_product(__m512 sums, __m512i query, __m512i keys, bf16) {
  return _mm512_dpbf16_ps(sums, (__m512bh)query, (__m512bh)keys);
}

template <typename T>
struct Attention {
  const Paged &c;
  const Pages &pages = *c.pages;
  const int64_t *unseen = pages.unseen + c.layer * pages.unseen_stride;
  static constexpr int64_t PER_WORD = 4 / sizeof(T), LINE = 64 / sizeof(T);
  int64_t width = c.kv_heads * c.head_dim, group = c.heads / c.kv_heads;
  int64_t words = tiles(c.head_dim, PER_WORD * LANES) * LANES;  // of a head, in whole vectors
  int64_t depth = tiles(c.head_dim, LANES) * LANES;

  // Positions [from, to) that a row sees.
  int64_t to(const Item &item, int64_t row) const { return pages.sequences[item.sequence].before + row + 1; }
  int64_t from(const Item &item, int64_t row) const {
    const int64_t first = unseen[item.sequence];
    return c.window ? max(first, to(item, row) - c.window) : first;
  }

  const T *cached(const Item &item, int64_t position) const {
    const int64_t block = pages.tables[item.sequence * pages.table_stride + position / c.block];
    return static_cast<const T *>(c.cache) + (block * c.block + position % c.block) * 2 * width;
  }

  // Positions, in whole tiles, whose keys and values are read at a time.
  int64_t stretch(const Item &item) const {
    return max(READ / (2 * (item.end - item.head) * c.head_dim * int64_t{sizeof(T)} * LANES), int64_t{1}) * LANES;
  }

  // Reads values, and keys before them, in the order in which they lie in memory, which the processor fetches by itself as
  // fast as memory gives it. Asked to fetch what is used next it lost most of it: cold keys and values took as long.
  void read(const Item &item, int64_t at, int64_t high, bool keys) const {
    const int64_t begin = item.head * c.head_dim, end = item.end * c.head_dim, stop = min(at + stretch(item), high);
    if ((end - begin) % LINE) return;  // the last line would end beyond the row
    __m512i all = _mm512_setzero_si512();
    for (int64_t p = at; p < stop; p++) {
      const T *key = cached(item, p), *value = key + width;
      for (int64_t d = begin; keys && d < end; d += LINE) all = _mm512_or_si512(all, _mm512_loadu_si512(key + d));
      for (int64_t d = begin; d < end; d += LINE) all = _mm512_or_si512(all, _mm512_loadu_si512(value + d));
    }
    asm volatile("" : : "v"(all));  // else the compiler leaves it out
  }

  void run(const Item &item) const {
    const int64_t queries = (item.last - item.first) * group, all = queries * (item.end - item.head);
    const int64_t low = from(item, item.first) / LANES * LANES, high = to(item, item.last - 1);
    const int64_t span = tiles(high - low, LANES) * LANES, ahead = stretch(item);
    int64_t unread = low;
    uint32_t *q = query_scratch.get(all * words), *tile = key_scratch.get(words * LANES);
    float *scores = score_scratch.get(all * span), *sums = sum_scratch.get(all * depth);
    for (int64_t i = 0; i < all; i++) {
      memset(q + i * words, 0, words * sizeof(uint32_t));
      memcpy(q + i * words, row_of<const T>(c.q, c.q_stride, item, i), c.head_dim * sizeof(T));
    }
    memset(sums, 0, all * depth * sizeof(float));
    for (int64_t at = low; at < high; at += LANES) {
      if (at == unread) read(item, at, high, true), unread += ahead;
      for (int64_t head = item.head; head < item.end; head++) {
        keys(item, head, at, min(LANES, high - at), tile);
        for (int64_t i = (head - item.head) * queries, n = i + queries; i < n; i++)
          score(q + i * words, tile, item, row(item, i), at, scores + i * span + at - low);
      }
    }
    for (int64_t i = 0; i < all; i++) weigh(item, i, scores + i * span, low);
    unread = low + ahead;  // whose values are likely at hand
    for (int64_t at = low; at < high; at += LANES) {
      if (at == unread) read(item, at, high, false), unread += ahead;
      for (int64_t i = 0, n; i < all; i += n) {
        n = min(AT_ONCE, queries - i % queries);
        const float *weights = scores + i * span + at - low;
        if (n == 4) add<4>(item, i, at, high, weights, span, sums + i * depth);
        if (n == 3) add<3>(item, i, at, high, weights, span, sums + i * depth);
        if (n == 2) add<2>(item, i, at, high, weights, span, sums + i * depth);
        if (n == 1) add<1>(item, i, at, high, weights, span, sums + i * depth);
      }
    }
    for (int64_t i = 0; i < all; i++) {
      T *own = row_of<T>(c.out, c.out_stride, item, i);
      along(c.head_dim, [&](int64_t d, __mmask16 m) { store(own + d, load(sums + i * depth + d, m), m); });
    }
  }

  // Queries of an item lie head by head, of a head row by row, of a row one beside the other.
  int64_t row(const Item &item, int64_t i) const { return item.first + i / group % (item.last - item.first); }
  int64_t head(const Item &item, int64_t i) const {
    return (item.head + i / group / (item.last - item.first)) * group + i % group;
  }

  template <typename Number, typename Any>
  Number *row_of(Any *rows, int64_t stride, const Item &item, int64_t i) const {
    return static_cast<Number *>(rows) + (pages.sequences[item.sequence].start + row(item, i)) * stride +
           head(item, i) * c.head_dim;
  }

  // The keys of `count` positions with a position in each lane, [words, 16]; zeros in the other lanes.
  void keys(const Item &item, int64_t head, int64_t at, int64_t count, uint32_t *tile) const {
    const T *rows[LANES];
    for (int64_t p = 0; p < count; p++) rows[p] = cached(item, at + p) + head * c.head_dim;
    for (int64_t w = 0; w < words; w += LANES) {
      const __mmask32 m = below(c.head_dim - w * PER_WORD);
      __m512i t[SIDE];
      for (int64_t p = 0; p < LANES; p++) {
        t[p] = _mm512_setzero_si512();
        if (p >= count) continue;
        if constexpr (PER_WORD == 2) t[p] = _mm512_maskz_loadu_epi16(m, rows[p] + w * PER_WORD);
        if constexpr (PER_WORD == 1) t[p] = _mm512_maskz_loadu_epi32(m, rows[p] + w);
      }
      transpose(t);
      for (int64_t p = 0; p < LANES; p++) _mm512_store_si512(tile + (w + p) * LANES, t[p]);
    }
  }

  // The scores of a query in a tile: -inf where its row does not see.
  void score(const uint32_t *q, const uint32_t *tile, const Item &item, int64_t row, int64_t at, float *scores) const {
    __m512 parts[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t w = 0; w < words; w += 4)
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; j++)
        parts[j] = add_product(parts[j], _mm512_set1_epi32(q[w + j]), _mm512_load_si512(tile + (w + j) * LANES), T{});
    const __m512 all = _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
    _mm512_store_ps(scores, _mm512_mul_ps(all, _mm512_set1_ps(c.scaling)));
    const auto cap = static_cast<float>(c.cap);
    if (c.cap)
      for (int64_t p = 0; p < LANES; p++) scores[p] = cap * tanhf(scores[p] / cap);
    const __mmask16 seen = lanes(to(item, row) - at) & ~lanes(from(item, row) - at);
    _mm512_mask_store_ps(scores, ~seen, _mm512_set1_ps(-INFINITY));
  }

  // A query's softmax over its scores, and the log of its sum where that is asked for.
  void weigh(const Item &item, int64_t i, float *scores, int64_t low) const {
    const int64_t begin = from(item, row(item, i)) / LANES * LANES - low, end = to(item, row(item, i)) - low;
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t p = begin; p < end; p += LANES) most = _mm512_max_ps(most, _mm512_load_ps(scores + p));
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t p = begin; p < end; p += LANES) {
      const __m512 e = exponential(_mm512_sub_ps(_mm512_load_ps(scores + p), peak));
      total = _mm512_add_ps(total, e);
      _mm512_store_ps(scores + p, e);
    }
    const float sum = _mm512_reduce_add_ps(total);
    for (int64_t p = begin; p < end; p += LANES)
      _mm512_store_ps(scores + p, _mm512_div_ps(_mm512_load_ps(scores + p), _mm512_set1_ps(sum)));
    const int64_t batch_row = pages.sequences[item.sequence].start + row(item, i);
    if (c.sums) c.sums[batch_row * c.heads + head(item, i)] = _mm512_cvtss_f32(peak) + logf(sum);
  }

  // Adds the weighted values of a tile to N queries of one head, position by position: of each query those that its
  // row sees.
  template <int N>
  void add(const Item &item, int64_t i, int64_t at, int64_t high, const float *weights, int64_t span, float *sums) const {
    int64_t begin[N], end[N], first = LANES, last = 0;
    for (int64_t n = 0; n < N; n++) {
      begin[n] = max(from(item, row(item, i + n)) - at, int64_t{0});
      end[n] = min(to(item, row(item, i + n)), at + LANES) - at;
      first = min(first, begin[n]), last = max(last, end[n]);
    }
    const T *values[LANES];
    for (int64_t p = first; p < last; p++)
      values[p] = cached(item, at + p) + width + head(item, i) / group * c.head_dim;
    for (int64_t d = 0; d < c.head_dim; d += 4 * LANES) {
      __m512 s[N][4];
      const __mmask16 m[4] = {lanes(c.head_dim - d), lanes(c.head_dim - d - LANES), lanes(c.head_dim - d - 2 * LANES),
                              lanes(c.head_dim - d - 3 * LANES)};
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) s[n][j] = load(sums + n * depth + d + j * LANES, m[j]);
      for (int64_t p = first; p < last; p++) {
        __m512 v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) v[j] = load(values[p] + d + j * LANES, m[j]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const __mmask16 sees = begin[n] <= p && p < end[n] ? 0xffff : 0;
          const __m512 weight = _mm512_set1_ps(weights[n * span + p]);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) s[n][j] = _mm512_mask3_fmadd_ps(weight, v[j], s[n][j], sees);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(sums + n * depth + d + j * LANES, s[n][j], m[j]);
    }
  }

  // Rows of no sequence.
  void clear() const {
    std::vector<char> mine(c.rows, 0);
    for (const Continued *s = pages.sequences; s < pages.sequences + pages.count; s++)
      std::fill_n(mine.begin() + s->start, s->rows, 1);
    for (int64_t row = 0; row < c.rows; row++)
      if (!mine[row]) {
        std::fill_n(static_cast<T *>(c.out) + row * c.out_stride, c.heads * c.head_dim, T{0});
        if (c.sums) std::fill_n(c.sums + row * c.heads, c.heads, -INFINITY);
      }
  }

  // Key heads of a decoding row are read together, since they lie together, where there are rows enough for all threads.
  void run() const {
    clear();
    std::vector<Item> items;
    const int64_t step = max(TOGETHER / group, int64_t{1}), heads = pages.count >= 4 * c.threads ? c.kv_heads : 1;
    for (int64_t s = 0; s < pages.count; s++)
      for (int64_t first = 0; first < pages.sequences[s].rows; first += step)
        for (int64_t head = 0, end; head < c.kv_heads; head = end) {
          end = min(pages.sequences[s].rows == 1 ? head + heads : head + 1, c.kv_heads);
          items.push_back({s, first, min(first + step, pages.sequences[s].rows), head, end});
        }
    const int64_t count = items.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(count == 1 ? 1 : c.threads)
    for (int64_t i = 0; i < count; i++) run(items[i]);
  }
};

}  // namespace

extern "C" int64_t size_of_paged() { return sizeof(Paged); }
extern "C" int64_t size_of_pages() { return sizeof(Pages); }

extern "C" void paged(const Paged *c) {
  of_dtype(c->dtype, [&](auto t) { Attention<decltype(t)>{*c}.run(); });
}
