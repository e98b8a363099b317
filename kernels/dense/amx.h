// Sums of a block of up to 16 rows by a panel, in the tiles of AMX.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "branches.h"

namespace {

constexpr int64_t PARTS = 1;    // of a panel, which threads may share
constexpr int64_t CHUNK = 384;  // terms at a time: so many of a panel fit the first cache beside a block of x

// Asks the kernel for the tiles; whether this process may use them.
bool allowed() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

int64_t terms_at_a_time(int64_t in, int64_t blocks) { return blocks > 1 ? CHUNK : in; }

// An item's ranks of B beside a panel, and whether all of them are finite.
struct Ranks {
  bf16 *tiles;
  bool finite = true;

  void take(const bf16 *B, int64_t stride, int64_t ranks, int64_t width) {
    const int64_t depth = ::tiles(ranks, DEPTH);
    interleave(B, stride, ranks, width, depth * SIDE, tiles);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 infinite = 0;
    for (const bf16 *v = tiles; v < tiles + depth * ACROSS * TILE; v += DEPTH)
      infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_load_si512(v), exponent), exponent);
    finite = !infinite;
  }
};

// In tiles 0 to 3; 4 is a left operand, 5 to 7 are right ones.
class Sums {
 public:
  ~Sums() { _tile_release(); }

  // Sums of `rows` rows by a panel, [16, PANEL], begin at 0 or go on.
  void open(float *sums, int64_t rows, int64_t, bool resumes) {
    shape(rows);
    sums_ = sums;
    if (resumes) return load();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  void close() {
    _tile_stored(0, sums_, PANEL * sizeof(float));
    _tile_stored(1, sums_ + SIDE, PANEL * sizeof(float));
    _tile_stored(2, sums_ + 2 * SIDE, PANEL * sizeof(float));
    _tile_stored(3, sums_ + 3 * SIDE, PANEL * sizeof(float));
  }

  // Adds rows of a left operand, `stride` apart, times `pairs` pairs of terms of right ones, in whole tiles.
  void multiply(const bf16 *left, int64_t stride, const bf16 *right, int64_t pairs, int64_t = 0) {
    for (int64_t k = 0; k < pairs; k += SIDE, left += DEPTH, right += ACROSS * TILE) {
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

  // Adds an item's hidden values times its ranks of B.
  void add(const Item &item, const bf16 *hidden, const Ranks &ranks) {
    if (ranks.finite) return multiply(hidden, item.hidden_stride(), ranks.tiles, item.hidden_stride() / 2);
    close();
    add_alone(item, hidden, ranks.tiles);
    load();
  }

  // The product of `rows` rows of such a left operand and right ones, one for each, to [16, 16]; no sums are left.
  void narrow(const bf16 *left, int64_t stride, int64_t rows, const bf16 *right, int64_t depth, float *to) {
    alignas(64) float odd[SIDE * SIDE];  // two sums, so that one need not wait for the other
    shape(rows);
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

  void load() {
    _tile_loadd(0, sums_, PANEL * sizeof(float));
    _tile_loadd(1, sums_ + SIDE, PANEL * sizeof(float));
    _tile_loadd(2, sums_ + 2 * SIDE, PANEL * sizeof(float));
    _tile_loadd(3, sums_ + 3 * SIDE, PANEL * sizeof(float));
  }

  // An item's share where B is not finite: a foreign row's 0 times that would be NaN.
  void add_alone(const Item &item, const bf16 *hidden, const bf16 *right) const {
    for (int64_t i = item.from; i < item.to; i++)
      for (int64_t c = 0; c < PANEL; c++)
        for (int64_t r = 0; r < item.ranks; r++) {
          const bf16 *tile = right + (r / DEPTH * ACROSS + c / SIDE) * TILE;
          const bf16 b = tile[r % DEPTH / 2 * DEPTH + c % SIDE * 2 + r % 2];
          sums_[i * PANEL + c] += widened(hidden[i * item.hidden_stride() + r]) * widened(b);
        }
  }

  float *sums_ = nullptr;
  int64_t rows_ = 0;
};
// The values between A and B of items of x [rows, in], whose rows are `stride` apart, to `hidden`.
class Projection {
 public:
  Projection(const bf16 *x, int64_t stride, int64_t rows, int64_t in, bf16 *hidden)
      : x_(x), stride_(stride), rows_(rows), in_(in), hidden_(hidden) {}

  void project_down(const Item &item, Sums &sums) {
    static thread_local Scratch<bf16> scratch;
    bf16 *columns = scratch.get(in_ * SIDE);
    const int64_t b = item.block;
    if (b != block_) transpose_tiles(x_ + b * SIDE * stride_, stride_, rows_ - b * SIDE, in_ / DEPTH, columns);
    block_ = b;
    for (int64_t r = 0; r < item.hidden_stride(); r += SIDE) {
      __m512i t[SIDE];
      if (r < item.ranks) {
        const Branch &branch = *item.branch;
        const int64_t ranks = std::min(item.ranks - r, SIDE);
        alignas(64) float products[SIDE * SIDE];
        sums.narrow(item.A(r), branch.depth, ranks, columns + branch.from * SIDE, branch.depth / DEPTH, products);
        for (int64_t i = 0; i < ranks; i++) t[i] = _mm512_load_si512(products + i * SIDE);
      }
      finish(item, r, t, hidden_);
    }
  }

 private:
  const bf16 *x_;
  int64_t stride_, rows_, in_, block_ = -1;
  bf16 *hidden_;
};

}  // namespace
