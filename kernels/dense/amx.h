// Sums of a block of up to 16 rows by a panel, in the tiles of AMX.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "operands.h"

namespace {

// Asks the kernel for the tiles; whether this process may use them.
bool allowed() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

// In tiles 0 to 3; 4 is a left operand, 5 to 7 are right ones.
class Sums {
 public:
  ~Sums() { _tile_release(); }

  // To be called first, and before a block of another height.
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct {
      uint8_t palette = 1, rest[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.rows[i] = i < 5 ? rows : SIDE;
    asm volatile("" : : "r"(&config) : "memory");  // gcc believes that only its first bytes are read
    _tile_loadconfig(&config);
  }

  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  void load(const float *from) {
    _tile_loadd(0, from, PANEL * sizeof(float));
    _tile_loadd(1, from + SIDE, PANEL * sizeof(float));
    _tile_loadd(2, from + 2 * SIDE, PANEL * sizeof(float));
    _tile_loadd(3, from + 3 * SIDE, PANEL * sizeof(float));
  }

  void store(float *to) const {
    _tile_stored(0, to, PANEL * sizeof(float));
    _tile_stored(1, to + SIDE, PANEL * sizeof(float));
    _tile_stored(2, to + 2 * SIDE, PANEL * sizeof(float));
    _tile_stored(3, to + 3 * SIDE, PANEL * sizeof(float));
  }

  // Adds `depth` tiles of a left operand, whose rows are `stride` apart, times right ones, four for each.
  void multiply(const bf16 *left, int64_t stride, const bf16 *right, int64_t depth) {
    for (int64_t k = 0; k < depth; k++, left += DEPTH, right += ACROSS * TILE) {
      _tile_loadd(4, left, stride * sizeof(bf16));
      _tile_loadd(5, right, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, right + TILE, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, right + 2 * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, right + 3 * TILE, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }

  // The product of such a left operand and right ones, one for each, to [16, 16]; no sums are left.
  void narrow(const bf16 *left, int64_t stride, const bf16 *right, int64_t depth, float *to) {
    alignas(64) float odd[SIDE * SIDE];  // two sums, so that one need not wait for the other
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < depth; k += 2, left += 2 * DEPTH, right += 2 * TILE) {
      _tile_loadd(4, left, stride * sizeof(bf16));
      _tile_loadd(5, right, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (k + 1 == depth) break;
      _tile_loadd(4, left + DEPTH, stride * sizeof(bf16));
      _tile_loadd(6, right + TILE, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, odd, 64);
    for (int64_t i = 0; i < rows_ * SIDE; i += SIDE)
      _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(odd + i)));
  }

 private:
  int64_t rows_ = 0;
};

}  // namespace
