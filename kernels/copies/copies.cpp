// Many small copies in one pass, each rounded to the dtype that it goes to.

#include <omp.h>

#include "common/rows.h"

// What polygraft.kernels.copies.op sends, every field of 8 bytes: `count` of `sizes` elements each.
struct Copies {
  void *const *into;
  const void *const *of;
  const int64_t *sizes;
  int64_t count, into_dtype, of_dtype, threads;
};

extern "C" int64_t size_of_copies() { return sizeof(Copies); }

extern "C" void copies(const Copies *c) {
  of_dtype(c->into_dtype, [&](auto to) {
    of_dtype(c->of_dtype, [&](auto from) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(c->threads)
      for (int64_t k = 0; k < c->count; k++) {
        auto *into = static_cast<decltype(to) *>(c->into[k]);
        const auto *of = static_cast<const decltype(from) *>(c->of[k]);
        along(c->sizes[k], [&](int64_t i, __mmask16 m) { store(into + i, load(of + i, m), m); });
      }
    });
  });
}
