// Queries and keys turned by their positions, keys and values put in their places of a paged cache: one pass.

#include <omp.h>

#include "common/rows.h"

// What polygraft.kernels.rotary.op sends, every field of 8 bytes. Rows of a tensor are its stride apart, in elements;
// cos and sin [rows, turned] lie dense. A cache row is a key and a value, one after the other; a slot below 0 is none.
struct Rotary {
  void *q;
  const void *k, *v, *cos, *sin, *q_weight, *k_weight;
  void *cache;
  const int64_t *slots;
  int64_t q_stride, k_stride, v_stride, rows, heads, kv_heads, head_dim, turned, dtype, weight_dtype;
  double eps;
  int64_t threads;
};

// Queries and keys turned, or with `back` the gradients of what was turned.
struct Turned {
  const void *q, *k, *cos, *sin;
  void *q_to, *k_to;
  int64_t q_stride, k_stride, q_to_stride, k_to_stride, rows, heads, kv_heads, head_dim, turned, dtype, back, threads;
};

namespace {

constexpr int64_t ALONE = 1 << 15;  // elements below which one thread is enough

// x / rms(x) times a weight, rounded where transformers' RMS norm rounds.
template <typename T, typename W>
void normed(const T *x, const W *weight, int64_t width, float eps, T *to) {
  __m512 square = _mm512_setzero_ps();
  along(width, [&](int64_t i, __mmask16 m) {
    const __m512 v = load(x + i, m);
    square = _mm512_fmadd_ps(v, v, square);
  });
  const float mean = _mm512_reduce_add_ps(square) / width;
  const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(_mm512_set1_ps(mean + eps)));
  along(width, [&](int64_t i, __mmask16 m) {
    store(to + i, _mm512_mul_ps(rounded<W>(_mm512_mul_ps(load(x + i, m), scale)), load(weight + i, m)), m);
  });
}

// x cos + turned(x) sin, each product and the sum rounded; `to` may be x.
template <typename T, typename C>
void turn(const T *x, const T *cos, const T *sin, const C &c, T *to) {
  const int64_t half = c.turned / 2;
  along(half, [&](int64_t i, __mmask16 m) {
    const __m512 low = load(x + i, m), high = load(x + half + i, m), none = _mm512_setzero_ps();
    const __m512 first = rounded<T>(_mm512_mul_ps(low, load(cos + i, m)));
    const __m512 second = rounded<T>(_mm512_mul_ps(high, load(cos + half + i, m)));
    const __m512 back = rounded<T>(_mm512_mul_ps(_mm512_sub_ps(none, high), load(sin + i, m)));
    const __m512 forth = rounded<T>(_mm512_mul_ps(low, load(sin + half + i, m)));
    store(to + i, _mm512_add_ps(first, back), m);
    store(to + half + i, _mm512_add_ps(second, forth), m);
  });
  if (to != x) along(c.head_dim - c.turned, [&](int64_t i, __mmask16 m) {
    store(to + c.turned + i, load(x + c.turned + i, m), m);
  });
}

// The gradient of x of that of what it was turned to, rounded alike.
template <typename T>
void turn_back(const T *dy, const T *cos, const T *sin, const Turned &c, T *to) {
  const int64_t half = c.turned / 2;
  along(half, [&](int64_t i, __mmask16 m) {
    const __m512 low = load(dy + i, m), high = load(dy + half + i, m), none = _mm512_setzero_ps();
    const __m512 first = rounded<T>(_mm512_mul_ps(low, load(cos + i, m)));
    const __m512 second = rounded<T>(_mm512_mul_ps(high, load(cos + half + i, m)));
    const __m512 forth = rounded<T>(_mm512_mul_ps(high, load(sin + half + i, m)));
    const __m512 back = rounded<T>(_mm512_mul_ps(_mm512_sub_ps(none, low), load(sin + i, m)));
    store(to + i, _mm512_add_ps(first, forth), m);
    store(to + half + i, _mm512_add_ps(second, back), m);
  });
  along(c.head_dim - c.turned, [&](int64_t i, __mmask16 m) {
    store(to + c.turned + i, load(dy + c.turned + i, m), m);
  });
}

template <typename T>
void heads_of(const Turned &c, int64_t t, const void *from, int64_t stride, int64_t heads, void *to, int64_t to_stride) {
  const T *cos = static_cast<const T *>(c.cos) + t * c.turned, *sin = static_cast<const T *>(c.sin) + t * c.turned;
  const T *x = static_cast<const T *>(from) + t * stride;
  T *y = static_cast<T *>(to) + t * to_stride;
  for (int64_t head = 0; head < heads; head++, x += c.head_dim, y += c.head_dim)
    c.back ? turn_back(x, cos, sin, c, y) : turn(x, cos, sin, c, y);
}

template <typename T, typename W>
void row(const Rotary &c, int64_t t) {
  const T *cos = static_cast<const T *>(c.cos) + t * c.turned, *sin = static_cast<const T *>(c.sin) + t * c.turned;
  const W *q_weight = static_cast<const W *>(c.q_weight), *k_weight = static_cast<const W *>(c.k_weight);
  const auto eps = static_cast<float>(c.eps);
  T *q = static_cast<T *>(c.q) + t * c.q_stride;
  for (int64_t head = 0; head < c.heads; head++, q += c.head_dim) {
    if (q_weight) normed(q, q_weight, c.head_dim, eps, q);
    turn(q, cos, sin, c, q);
  }
  if (c.slots[t] < 0) return;
  const int64_t width = c.kv_heads * c.head_dim;
  const T *k = static_cast<const T *>(c.k) + t * c.k_stride, *v = static_cast<const T *>(c.v) + t * c.v_stride;
  T *key = static_cast<T *>(c.cache) + c.slots[t] * 2 * width, *value = key + width;
  for (int64_t head = 0; head < c.kv_heads; head++, k += c.head_dim, key += c.head_dim) {
    if (k_weight) normed(k, k_weight, c.head_dim, eps, key);
    turn(k_weight ? key : k, cos, sin, c, key);
  }
  along(width, [&](int64_t i, __mmask16 m) { store(value + i, load(v + i, m), m); });
}

}  // namespace

extern "C" int64_t size_of_rotary() { return sizeof(Rotary); }

extern "C" int64_t size_of_turned() { return sizeof(Turned); }

extern "C" void turned(const Turned *c) {
  const int64_t width = (c->heads + c->kv_heads) * c->head_dim;
  of_dtype(c->dtype, [&](auto t) {
#pragma omp parallel for num_threads(c->rows * width < ALONE ? 1 : c->threads)
    for (int64_t i = 0; i < c->rows; i++) {
      heads_of<decltype(t)>(*c, i, c->q, c->q_stride, c->heads, c->q_to, c->q_to_stride);
      heads_of<decltype(t)>(*c, i, c->k, c->k_stride, c->kv_heads, c->k_to, c->k_to_stride);
    }
  });
}

extern "C" void rotary(const Rotary *c) {
  const int64_t width = (c->heads + 2 * c->kv_heads) * c->head_dim;
  of_dtype(c->dtype, [&](auto t) {
    of_dtype(c->weight_dtype, [&](auto w) {
#pragma omp parallel for num_threads(c->rows * width < ALONE ? 1 : c->threads)
      for (int64_t i = 0; i < c->rows; i++) row<decltype(t), decltype(w)>(*c, i);
    });
  });
}
