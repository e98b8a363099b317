// Attention of whole sequences, each after its own prefix rows, and its gradients; products of bf16, sums of float32.
//
// A sequence and a key head are one thread's. Its queries are taken in blocks from its first one on, and sums over keys
// or queries run in the sequence's own order: no other sequence and no number of threads has a part in their bits.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/rows.h"
#include "dense/operands.h"

// What polygraft.kernels.kv.whole sends, every field of 8 bytes. `part` is the sequence's first row among the prefix
// rows of all sequences.
struct Ragged {
  int64_t start, length, key_start, key_length, prefix_first, prefix_length, part;
};

// Rows of a tensor are its stride apart, in elements. Without `dq` only `out` is written, and `sums` [rows, heads], the
// log of each softmax's sum, where it is asked for; else the gradients are, those of prefix rows in float32 [rows of all
// sequences' prefixes, kv_heads * head_dim], dense, of those of `out` and, if there are any, of the sums.
struct Whole {
  const bf16 *q, *k, *v, *pk, *pv, *grad;
  bf16 *out, *dq, *dk, *dv;
  float *dpk, *dpv, *sums;
  const float *grad_sums;
  const Ragged *sequences;
  int64_t count, q_stride, k_stride, v_stride, p_stride, grad_stride, out_stride, dk_stride, heads, kv_heads, head_dim;
  int64_t causal, window;
  double scaling;
  int64_t threads;
};

namespace {

using std::max, std::min;

constexpr int64_t BLOCK = 64;          // queries at a time
constexpr int64_t TALL = 6, WIDE = 4;  // rows and vectors of sums that registers hold

thread_local Scratch<uint32_t> key_columns, value_columns, key_pairs, value_pairs, weight_rows, weight_pairs, slope_pairs,
    query_pairs, grad_pairs;
thread_local Scratch<float> weight_scratch, slope_scratch, block_scratch, dk_scratch, dv_scratch;

// A left operand's word w of row m is at m * row + w * word; a word is two numbers whose products are summed together.
struct Left {
  const uint32_t *words;
  int64_t row, word;
};

// sums [M, 16 V] = left times right, whose rows of words are `stride` apart; or are added to.
template <int M, int V>
void multiply(Left left, const uint32_t *right, int64_t stride, int64_t words, float *sums, int64_t width, bool adds) {
  __m512 s[M][V];
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) s[m][v] = adds ? _mm512_loadu_ps(sums + m * width + v * LANES) : _mm512_setzero_ps();
  for (int64_t w = 0; w < words; w++) {
    __m512i r[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) r[v] = _mm512_loadu_si512(right + w * stride + v * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const auto l = (__m512bh)_mm512_set1_epi32(left.words[m * left.row + w * left.word]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) s[m][v] = _mm512_dpbf16_ps(s[m][v], l, (__m512bh)r[v]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + m * width + v * LANES, s[m][v]);
}

template <int V>
void rows_of(Left l, int64_t rows, const uint32_t *right, int64_t stride, int64_t words, float *sums, int64_t width, bool adds) {
  for (int64_t m = 0; m < rows; m += TALL) {
    const Left own{l.words + m * l.row, l.row, l.word};
    float *to = sums + m * width;
    switch (min(rows - m, TALL)) {
      case 6: multiply<6, V>(own, right, stride, words, to, width, adds); break;
      case 5: multiply<5, V>(own, right, stride, words, to, width, adds); break;
      case 4: multiply<4, V>(own, right, stride, words, to, width, adds); break;
      case 3: multiply<3, V>(own, right, stride, words, to, width, adds); break;
      case 2: multiply<2, V>(own, right, stride, words, to, width, adds); break;
      default: multiply<1, V>(own, right, stride, words, to, width, adds);
    }
  }
}

// sums [rows, columns], columns a multiple of 16.
void product(Left l, int64_t rows, const uint32_t *right, int64_t stride, int64_t words, int64_t columns, float *sums,
             int64_t width, bool adds) {
  for (int64_t c = 0; c < columns; c += WIDE * LANES) switch (min(tiles(columns - c, LANES), WIDE)) {
      case 4: rows_of<4>(l, rows, right + c, stride, words, sums + c, width, adds); break;
      case 3: rows_of<3>(l, rows, right + c, stride, words, sums + c, width, adds); break;
      case 2: rows_of<2>(l, rows, right + c, stride, words, sums + c, width, adds); break;
      default: rows_of<1>(l, rows, right + c, stride, words, sums + c, width, adds);
    }
}

__m512i as_words(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_srli_epi32(rounded_bits(low), 16), _mm512_slli_epi32(_mm512_srli_epi32(rounded_bits(high), 16), 16));
}

// Pairs of rows, a word for each column: [rows / 2, width]; a row beyond the last is zeros.
template <typename Row>
void pair_rows(int64_t rows, int64_t width, Row row, uint32_t *to) {
  for (int64_t p = 0; 2 * p < rows; p++, to += width)
    for (int64_t d = 0; d < width; d += LANES) {
      const __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row(2 * p) + d)));
      const __m512i two = 2 * p + 1 < rows
                              ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row(2 * p + 1) + d)))
                              : _mm512_setzero_si512();
      _mm512_storeu_si512(to + d, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
    }
}

struct Head {
  const Whole &c;
  const Ragged &s;
  int64_t head;  // of the keys
  int64_t depth = c.head_dim, seen = s.prefix_length + s.key_length, padded = tiles(seen, 32) * 32;

  // Row n of the keys or values: the prefix's come first.
  const bf16 *row(const bf16 *prefix, const bf16 *x, int64_t stride, int64_t n) const {
    const bf16 *from = n < s.prefix_length ? prefix + (s.prefix_first + n) * c.p_stride
                                           : x + (s.key_start + n - s.prefix_length) * stride;
    return from + head * depth;
  }

  // A word for each two numbers of a head, [depth / 2, padded]: a row in each column, zeros beyond the last.
  template <typename Row>
  void columns(Row row, uint32_t *to) const {
    for (int64_t n = 0; n < padded; n += LANES)
      for (int64_t w = 0; w < depth / 2; w += LANES) {
        __m512i t[SIDE];
        for (int64_t i = 0; i < LANES; i++)
          t[i] = n + i < seen ? _mm512_maskz_loadu_epi16(below(depth - 2 * w), row(n + i) + 2 * w) : _mm512_setzero_si512();
        transpose(t);
        for (int64_t i = 0; i < min(LANES, depth / 2 - w); i++) _mm512_storeu_si512(to + (w + i) * padded + n, t[i]);
      }
  }

  // The key positions [from, to) that query t sees.
  int64_t to(int64_t t) const { return c.causal ? s.prefix_length + t + 1 : seen; }
  int64_t from(int64_t t) const { return c.window ? max(s.prefix_length + t + 1 - c.window, int64_t{0}) : 0; }

  // softmax(scaling * q keys^T) of queries [t, t + rows) of a head in float32, [rows, width] over positions from `low`
  // on, zeros where a query does not see.
  void weigh(int64_t h, int64_t t, int64_t rows, const uint32_t *keys, int64_t low, int64_t width, float *weights) const {
    const bf16 *q = c.q + (s.start + t) * c.q_stride + h * depth;
    product({(const uint32_t *)q, c.q_stride / 2, 1}, rows, keys + low, padded, depth / 2, width, weights, width, false);
    const __m512 scaling = _mm512_set1_ps(c.scaling);
    for (int64_t r = 0; r < rows; r++, weights += width) {
      const int64_t begin = from(t + r) - low, end = to(t + r) - low;
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int64_t p = 0; p < width; p += LANES) {
        const __mmask16 sees = lanes(end - p) & ~lanes(begin - p);
        const __m512 x = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), sees, scaling, _mm512_loadu_ps(weights + p));
        _mm512_storeu_ps(weights + p, x);
        most = _mm512_max_ps(most, x);
      }
      const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
      for (int64_t p = 0; p < width; p += LANES) {
        const __mmask16 sees = lanes(end - p) & ~lanes(begin - p);
        const __m512 e = _mm512_maskz_mov_ps(sees, exponential(_mm512_sub_ps(_mm512_loadu_ps(weights + p), peak)));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(weights + p, e);
      }
      const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
      if (c.sums) c.sums[(s.start + t + r) * c.heads + h] = _mm512_cvtss_f32(peak) + logf(_mm512_cvtss_f32(sum));
      for (int64_t p = 0; p < width; p += LANES)
        _mm512_storeu_ps(weights + p, rounded<bf16>(_mm512_div_ps(_mm512_loadu_ps(weights + p), sum)));
    }
  }

  // Rows of float32, two numbers a word.
  static void round_rows(const float *x, int64_t rows, int64_t width, uint32_t *to) {
    for (int64_t i = 0; i < rows * width; i += 2 * LANES)
      _mm512_storeu_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + LANES), _mm512_loadu_ps(x + i)));
  }

  // Pairs of rows of float32, [rows / 2, width].
  static void round_pairs(const float *x, int64_t rows, int64_t width, uint32_t *to) {
    for (int64_t r = 0; r < rows; r += 2, to += width, x += 2 * width)
      for (int64_t p = 0; p < width; p += LANES)
        _mm512_storeu_si512(to + p, as_words(_mm512_loadu_ps(x + p),
                                             r + 1 < rows ? _mm512_loadu_ps(x + width + p) : _mm512_setzero_ps()));
  }

  static void put(const float *sums, int64_t rows, int64_t width, bf16 *to, int64_t stride) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < width; d += LANES) store(to + r * stride + d, _mm512_loadu_ps(sums + r * width + d), 0xffff);
  }

  // Calls visit(query head, first query, queries, first position, positions in whole tiles).
  template <typename Visit>
  void blocks(Visit visit) const {
    const int64_t group = c.heads / c.kv_heads;
    for (int64_t h = head * group; h < (head + 1) * group; h++)
      for (int64_t t = 0; t < s.length; t += BLOCK) {
        const int64_t rows = min(BLOCK, s.length - t), low = from(t) / 32 * 32;
        visit(h, t, rows, low, tiles(to(t + rows - 1) - low, 32) * 32);
      }
  }

  void forward() const {
    uint32_t *keys = key_columns.get(depth / 2 * padded), *values = value_pairs.get(padded / 2 * depth);
    columns([&](int64_t n) { return row(c.pk, c.k, c.k_stride, n); }, keys);
    memset(values, 0, padded / 2 * depth * sizeof(uint32_t));
    pair_rows(seen, depth, [&](int64_t n) { return row(c.pv, c.v, c.v_stride, n); }, values);
    float *weights = weight_scratch.get(BLOCK * padded), *sums = block_scratch.get(BLOCK * depth);
    uint32_t *rounded_weights = weight_rows.get(BLOCK * padded / 2);
    blocks([&](int64_t h, int64_t t, int64_t rows, int64_t low, int64_t width) {
      weigh(h, t, rows, keys, low, width, weights);
      round_rows(weights, rows, width, rounded_weights);
      product({rounded_weights, width / 2, 1}, rows, values + low / 2 * depth, depth, width / 2, depth, sums, depth, false);
      put(sums, rows, depth, c.out + (s.start + t) * c.out_stride + h * depth, c.out_stride);
    });
  }

  // dS = P (dP - sum(P dP) + dsum) scaling, in place of dP.
  void slopes(int64_t h, int64_t t, int64_t rows, int64_t width, const float *weights, float *dp) const {
    for (int64_t r = 0; r < rows; r++, weights += width, dp += width) {
      __m512 total = _mm512_setzero_ps();
      for (int64_t p = 0; p < width; p += LANES) {  // where a weight is 0 a slope may be anything: a key beyond the last
        const __m512 w = _mm512_loadu_ps(weights + p);
        const __mmask16 m = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        total = _mm512_mask3_fmadd_ps(w, _mm512_loadu_ps(dp + p), total, m);
      }
      const float dsum = c.grad_sums ? c.grad_sums[(s.start + t + r) * c.heads + h] : 0;
      const __m512 inner = _mm512_set1_ps(_mm512_reduce_add_ps(total) - dsum), scaling = _mm512_set1_ps(c.scaling);
      for (int64_t p = 0; p < width; p += LANES) {
        const __m512 w = _mm512_loadu_ps(weights + p);
        const __mmask16 m = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 slope = _mm512_mul_ps(w, _mm512_sub_ps(_mm512_loadu_ps(dp + p), inner));
        _mm512_storeu_ps(dp + p, _mm512_maskz_mul_ps(m, slope, scaling));
      }
    }
  }

  void backward() const {
    uint32_t *kc = key_columns.get(depth / 2 * padded), *vc = value_columns.get(depth / 2 * padded);
    uint32_t *kp = key_pairs.get(padded / 2 * depth);
    columns([&](int64_t n) { return row(c.pk, c.k, c.k_stride, n); }, kc);
    columns([&](int64_t n) { return row(c.pv, c.v, c.v_stride, n); }, vc);
    memset(kp, 0, padded / 2 * depth * sizeof(uint32_t));
    pair_rows(seen, depth, [&](int64_t n) { return row(c.pk, c.k, c.k_stride, n); }, kp);
    float *weights = weight_scratch.get(BLOCK * padded), *dp = slope_scratch.get(BLOCK * padded);
    float *sums = block_scratch.get(BLOCK * depth), *dk = dk_scratch.get(padded * depth), *dv = dv_scratch.get(padded * depth);
    uint32_t *wp = weight_pairs.get(BLOCK / 2 * padded), *sp = slope_pairs.get(BLOCK / 2 * padded);
    uint32_t *sr = weight_rows.get(BLOCK * padded / 2);
    uint32_t *qp = query_pairs.get(BLOCK / 2 * depth), *gp = grad_pairs.get(BLOCK / 2 * depth);
    memset(dk, 0, padded * depth * sizeof(float)), memset(dv, 0, padded * depth * sizeof(float));
    blocks([&](int64_t h, int64_t t, int64_t rows, int64_t low, int64_t width) {
      const bf16 *q = c.q + (s.start + t) * c.q_stride + h * depth;
      const bf16 *grad = c.grad + (s.start + t) * c.grad_stride + h * depth;
      const int64_t pairs = tiles(rows, 2);
      weigh(h, t, rows, kc, low, width, weights);
      round_pairs(weights, rows, width, wp);
      product({(const uint32_t *)grad, c.grad_stride / 2, 1}, rows, vc + low, padded, depth / 2, width, dp, width, false);
      slopes(h, t, rows, width, weights, dp);
      round_rows(dp, rows, width, sr);
      round_pairs(dp, rows, width, sp);
      pair_rows(rows, depth, [&](int64_t r) { return q + r * c.q_stride; }, qp);
      pair_rows(rows, depth, [&](int64_t r) { return grad + r * c.grad_stride; }, gp);
      product({sr, width / 2, 1}, rows, kp + low / 2 * depth, depth, width / 2, depth, sums, depth, false);
      put(sums, rows, depth, c.dq + (s.start + t) * c.out_stride + h * depth, c.out_stride);
      product({wp, 1, width}, width, gp, depth, pairs, depth, dv + low * depth, depth, true);
      product({sp, 1, width}, width, qp, depth, pairs, depth, dk + low * depth, depth, true);
    });
    const int64_t p = s.prefix_length, wide = c.kv_heads * depth;
    for (int64_t n = 0; n < p; n++) {
      memcpy(c.dpk + (s.part + n) * wide + head * depth, dk + n * depth, depth * sizeof(float));
      memcpy(c.dpv + (s.part + n) * wide + head * depth, dv + n * depth, depth * sizeof(float));
    }
    put(dk + p * depth, s.key_length, depth, c.dk + s.key_start * c.dk_stride + head * depth, c.dk_stride);
    put(dv + p * depth, s.key_length, depth, c.dv + s.key_start * c.dk_stride + head * depth, c.dk_stride);
  }
};

}  // namespace

extern "C" int64_t size_of_whole() { return sizeof(Whole); }
extern "C" int64_t size_of_ragged() { return sizeof(Ragged); }

extern "C" void whole(const Whole *c) {
  const int64_t items = c->count * c->kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(items == 1 ? 1 : c->threads)
  for (int64_t i = 0; i < items; i++) {
    const Head head{*c, c->sequences[i / c->kv_heads], i % c->kv_heads};
    c->dq ? head.backward() : head.forward();
  }
}
