// silu(gate) * up and its gradients, in one pass over rows of the two.

#include <omp.h>

#include "common/rows.h"

// What polygraft.kernels.swiglu.op sends, every field of 8 bytes. Rows of a tensor are its stride apart, in elements.
struct Forward {
  const void *gate, *up;
  void *out;
  int64_t rows, width, gate_stride, up_stride, dtype, threads;
};

struct Backward {
  const void *grad, *gate, *up;
  void *d_gate, *d_up;
  int64_t rows, width, grad_stride, gate_stride, up_stride, d_stride, dtype, threads;
};

namespace {

constexpr int64_t ALONE = 1 << 14;  // elements below which one thread is enough

__m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <typename T>
__m512 silu(__m512 x) {
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  return rounded<T>(_mm512_div_ps(x, below));
}

template <typename T>
void forward_rows(const Forward &c) {
#pragma omp parallel for num_threads(c.rows * c.width < ALONE ? 1 : c.threads)
  for (int64_t row = 0; row < c.rows; row++) {
    const T *gate = static_cast<const T *>(c.gate) + row * c.gate_stride;
    const T *up = static_cast<const T *>(c.up) + row * c.up_stride;
    T *out = static_cast<T *>(c.out) + row * c.width;
    along(c.width, [&](int64_t i, __mmask16 m) {
      store(out + i, _mm512_mul_ps(silu<T>(load(gate + i, m)), load(up + i, m)), m);
    });
  }
}

template <typename T>
void backward_rows(const Backward &c) {
#pragma omp parallel for num_threads(c.rows * c.width < ALONE ? 1 : c.threads)
  for (int64_t row = 0; row < c.rows; row++) {
    const T *grad = static_cast<const T *>(c.grad) + row * c.grad_stride;
    const T *gate = static_cast<const T *>(c.gate) + row * c.gate_stride;
    const T *up = static_cast<const T *>(c.up) + row * c.up_stride;
    T *d_gate = static_cast<T *>(c.d_gate) + row * c.d_stride, *d_up = static_cast<T *>(c.d_up) + row * c.d_stride;
    const __m512 one = _mm512_set1_ps(1);
    along(c.width, [&](int64_t i, __mmask16 m) {
      const __m512 g = load(grad + i, m), x = load(gate + i, m), s = sigmoid(x);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
      store(d_up + i, _mm512_mul_ps(silu<T>(x), g), m);
      store(d_gate + i, _mm512_mul_ps(rounded<T>(_mm512_mul_ps(g, load(up + i, m))), slope), m);
    });
  }
}

}  // namespace

extern "C" int64_t size_of_forward() { return sizeof(Forward); }
extern "C" int64_t size_of_backward() { return sizeof(Backward); }

extern "C" void swiglu(const Forward *c) {
  of_dtype(c->dtype, [&](auto t) { forward_rows<decltype(t)>(*c); });
}

extern "C" void swiglu_backward(const Backward *c) {
  of_dtype(c->dtype, [&](auto t) { backward_rows<decltype(t)>(*c); });
}
