// The residual sum and the frozen norm after it, a row at a time: read once, written once.

#include <omp.h>

#include "common/rows.h"

namespace {

constexpr int64_t ALONE = 1 << 16;  // elements below which one thread is enough

}  // namespace

// What polygraft.kernels.residual_norm.op sends, every field of 8 bytes. Rows lie one after the other; what is null is
// not there. `weight_dtype` is the bias's, too.
struct Forward {
  const void *x, *update;
  void *sum;
  const void *weight, *bias;
  void *y;
  float *means, *scales;
  int64_t rows, width, dtype, weight_dtype, centred;
  double eps;
  int64_t threads;
};

struct Backward {
  const void *dy, *dsum, *x, *weight;
  const float *means, *scales;
  void *dx;
  int64_t rows, width, dtype, weight_dtype, threads;
};

namespace {

template <typename T, typename W>
void forward_row(const Forward &c, int64_t row) {
  const int64_t at = row * c.width;
  const T *x = static_cast<const T *>(c.x) + at;
  if (c.update) {
    const T *update = static_cast<const T *>(c.update) + at;
    T *sum = static_cast<T *>(c.sum) + at;
    along(c.width, [&](int64_t i, __mmask16 m) { store(sum + i, _mm512_add_ps(load(x + i, m), load(update + i, m)), m); });
    x = sum;
  }
  __m512 mean = _mm512_setzero_ps(), square = _mm512_setzero_ps();
  if (c.centred) {
    along(c.width, [&](int64_t i, __mmask16 m) { mean = _mm512_add_ps(mean, load(x + i, m)); });
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / c.width);
  }
  along(c.width, [&](int64_t i, __mmask16 m) {
    const __m512 v = _mm512_maskz_sub_ps(m, load(x + i, m), mean);
    square = _mm512_fmadd_ps(v, v, square);
  });
  const float variance = _mm512_reduce_add_ps(square) / c.width;
  const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(_mm512_set1_ps(variance + (float)c.eps)));
  if (c.means) c.means[row] = _mm512_cvtss_f32(mean);
  if (c.scales) c.scales[row] = _mm512_cvtss_f32(scale);
  const W *weight = static_cast<const W *>(c.weight), *bias = static_cast<const W *>(c.bias);
  T *y = static_cast<T *>(c.y) + at;
  along(c.width, [&](int64_t i, __mmask16 m) {
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x + i, m), mean), scale);
    if (!c.centred) v = rounded<W>(v);  // transformers' RMS norms round here, to the weight's dtype
    if (weight) v = _mm512_mul_ps(v, load(weight + i, m));
    if (bias) v = _mm512_add_ps(v, load(bias + i, m));
    store(y + i, v, m);
  });
}

template <typename T, typename W>
void backward_row(const Backward &c, int64_t row) {
  const int64_t at = row * c.width;
  const T *dy = static_cast<const T *>(c.dy) + at, *x = static_cast<const T *>(c.x) + at;
  const T *dsum = c.dsum ? static_cast<const T *>(c.dsum) + at : nullptr;
  const W *weight = static_cast<const W *>(c.weight);
  T *dx = static_cast<T *>(c.dx) + at;
  const __m512 scale = _mm512_set1_ps(c.scales[row]), mean = _mm512_set1_ps(c.means ? c.means[row] : 0.f);
  // The slope of what was normed; an RMS norm's is of the dtype that its product had.
  const auto slope = [&](int64_t i, __mmask16 m) {
    __m512 g = load(dy + i, m);
    if (weight) g = _mm512_mul_ps(g, load(weight + i, m));
    return sizeof(T) == 2 && sizeof(W) == 2 && !c.means ? rounded<bf16>(g) : g;
  };
  __m512 all = _mm512_setzero_ps(), product = _mm512_setzero_ps();
  along(c.width, [&](int64_t i, __mmask16 m) {
    const __m512 g = slope(i, m);
    all = _mm512_add_ps(all, g);
    product = _mm512_fmadd_ps(g, _mm512_maskz_sub_ps(m, load(x + i, m), mean), product);
  });
  const float first = c.means ? _mm512_reduce_add_ps(all) / c.width : 0.f;
  const float second = _mm512_reduce_add_ps(product) / c.width;
  const __m512 shift = _mm512_set1_ps(first);
  const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(second), _mm512_mul_ps(scale, scale));
  along(c.width, [&](int64_t i, __mmask16 m) {
    const __m512 v = _mm512_sub_ps(load(x + i, m), mean);
    __m512 d = _mm512_sub_ps(_mm512_sub_ps(slope(i, m), shift), _mm512_mul_ps(v, inner));
    d = _mm512_mul_ps(d, scale);
    if (dsum) d = _mm512_add_ps(rounded<T>(d), load(dsum + i, m));
    store(dx + i, d, m);
  });
}

template <typename Row, typename Call>
void rows_of(const Call &c, Row row) {
#pragma omp parallel for num_threads(c.rows * c.width < ALONE ? 1 : c.threads)
  for (int64_t i = 0; i < c.rows; i++) row(i);
}

}  // namespace

extern "C" int64_t size_of_forward() { return sizeof(Forward); }
extern "C" int64_t size_of_backward() { return sizeof(Backward); }

extern "C" void residual_norm(const Forward *c) {
  of_dtype(c->dtype, [&](auto t) {
    of_dtype(c->weight_dtype, [&](auto w) {
      rows_of(*c, [&](int64_t row) { forward_row<decltype(t), decltype(w)>(*c, row); });
    });
  });
}

extern "C" void residual_norm_backward(const Backward *c) {
  of_dtype(c->dtype, [&](auto t) {
    of_dtype(c->weight_dtype, [&](auto w) {
      rows_of(*c, [&](int64_t row) { backward_row<decltype(t), decltype(w)>(*c, row); });
    });
  });
}
