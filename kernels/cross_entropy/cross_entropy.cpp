// Cross-entropy of rows of logits and its gradient in their place, in one pass to the cache of a core and one back.

#include <omp.h>

#include <cmath>

#include "common/rows.h"
#include "dense/operands.h"

// What polygraft.kernels.cross_entropy.op sends, every field of 8 bytes; logits [rows, width] dense.
struct Slope {
  void *logits;
  const int64_t *targets;
  const float *factors;
  float *losses;
  int64_t rows, width, dtype, threads;
};

namespace {

thread_local Scratch<float> powers;

// A row is one thread's from its first number to its last, sixteen sums side by side.
template <typename T>
void row(const Slope &c, int64_t r) {
  T *x = static_cast<T *>(c.logits) + r * c.width;
  float *e = powers.get(tiles(c.width, LANES) * LANES);
  __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  along(c.width, [&](int64_t i, __mmask16 m) { most = _mm512_mask_max_ps(most, m, most, load(x + i, m)); });
  const float peak = _mm512_reduce_max_ps(most);  // a NaN is no most, but makes the sum one
  along(c.width, [&](int64_t i, __mmask16 m) {
    const __m512 power = _mm512_maskz_mov_ps(m, exponential(_mm512_sub_ps(load(x + i, m), _mm512_set1_ps(peak))));
    _mm512_store_ps(e + i, power);
    total = _mm512_add_ps(total, power);
  });
  const float sum = _mm512_reduce_add_ps(total), factor = c.factors[r];
  const int64_t target = c.targets[r];
  T *own = x + target;
  c.losses[r] = logf(sum) + peak - _mm512_cvtss_f32(load(own, 1));
  const __m512 times = _mm512_set1_ps(1 / sum);
  e[target] -= sum;
  along(c.width, [&](int64_t i, __mmask16 m) {
    store(x + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(e + i), times), _mm512_set1_ps(factor)), m);
  });
}

}  // namespace

extern "C" int64_t size_of_slope() { return sizeof(Slope); }

extern "C" void cross_entropy(const Slope *c) {
  of_dtype(c->dtype, [&](auto t) {
#pragma omp parallel for num_threads(c->threads)
    for (int64_t r = 0; r < c->rows; r++) row<decltype(t)>(*c, r);
  });
}
