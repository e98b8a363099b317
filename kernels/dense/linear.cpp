// y = x W^T and the branches beside it, in bf16 on a CPU: results are written once, with what the grafts add.
//
// Every result is a sum in one order, which no other row and no other graft has a part in.

#include <omp.h>

#include <algorithm>
#include <vector>

#ifdef AMX
#include "amx.h"
#else
#include "avx512.h"
#endif

namespace {

using std::max, std::min;

constexpr int64_t ENOUGH = 8;       // blocks that are worth a thread's own reading of all packed weights
constexpr int64_t ALONE = 1 << 20;  // multiply-adds below which one thread is enough

struct Member {  // a projection: its first panel, and its columns of y
  int64_t panel, column, width;
};

enum Layout { PANELS, ROWS_OF_W, COLUMNS_OF_W };  // as Weights.packed has them, W [out, in], W^T [in, out]

// x [rows, in] whose rows are `stride` apart, `in` a multiple of 32; y [rows, out_stride]; then the branches.
struct Call {
  const bf16 *x;
  int64_t stride, rows, in;
  const bf16 *W;
  int64_t layout;
  const Member *members;
  int64_t member_count;
  bf16 *y;
  int64_t out_stride, branch_count, threads;

  const Branch *branches() const { return reinterpret_cast<const Branch *>(this + 1); }
  int64_t blocks() const { return tiles(rows, SIDE); }
};

thread_local Scratch<bf16> hidden_scratch, ranks_scratch, panel_scratch;
thread_local Scratch<float> sums_scratch;

// What passes through the branches of a call; items of block b and branch j begin at firsts[b * branch_count + j].
struct Items {
  std::vector<Item> all;
  std::vector<int64_t> firsts;
  size_t size = 0;      // elements of all hidden values
  int64_t deepest = 0;  // tiles of the largest rank

  explicit Items(const Call &call) {
    for (int64_t b = 0; b < call.blocks(); b++)
      for (const Branch *branch = call.branches(); branch < call.branches() + call.branch_count; branch++) {
        firsts.push_back(all.size());
        int64_t place = 0;
        for (const Segment *s = branch->segments; s < branch->segments + branch->count; s++) {
          const int64_t from = max(s->start - b * SIDE, int64_t{0}), to = min(s->stop - b * SIDE, SIDE);
          const int64_t ranks = s->last - s->first, depth = tiles(ranks, DEPTH);
          if (from < to && ranks) {
            all.push_back({branch, s, b, from, to, ranks, size, place});
            size += depth * TILE;
            deepest = max(deepest, depth);
          }
          place += kept_size(*s);
        }
      }
    firsts.push_back(all.size());
  }
};

// Computes panels of a call's result.
class Product {
 public:
  Product(const Call &call, const Items &items, const bf16 *hidden)
      : call_(call),
        items_(items),
        hidden_(hidden),
        ranks_{ranks_scratch.get(items.deepest * ACROSS * TILE)},
        chunk_(terms_at_a_time(call.in, call.blocks())),
        unfinished_(sums_scratch.get((chunk_ < call.in ? call.blocks() : 1) * SIDE * PANEL)) {}

  // Columns [column, column + width) of y for blocks [begin, end), from panel p, of which they begin at tile t.
  void compute(int64_t p, int64_t t, int64_t column, int64_t width, int64_t begin, int64_t end, Sums &sums) {
    const auto &[x, stride, rows, in, W, layout, members, member_count, y, out_stride, branch_count, threads] = call_;
    const int64_t across = tiles(width, DEPTH) * (DEPTH / SIDE);
    const bf16 *weights = layout == PANELS ? W + p * in * PANEL + t * TILE : pack(column, width);
    const int64_t ahead = layout == PANELS && end - begin == 1 ? in * PANEL : 0;  // the next panel
    held_ = nullptr;
    for (int64_t k = 0; k < in; k += chunk_)
      for (int64_t b = begin; b < end; b++) {
        const int64_t valid = min(rows - b * SIDE, SIDE), terms = min(chunk_, in - k);
        float *results = unfinished_ + (chunk_ < in ? b * SIDE * PANEL : 0);
        sums.open(results, valid, across, k > 0);
        sums.multiply(x + b * SIDE * stride + k, stride, weights + k * PANEL, terms / 2, ahead);
        if (k + terms == in) add_branches(b, column, width, sums);
        sums.close();
        if (k + terms == in) write(results, valid, width, y + b * SIDE * out_stride + column, out_stride, false);
      }
  }

 private:
  void add_branches(int64_t b, int64_t column, int64_t width, Sums &sums) {
    for (int64_t j = 0; j < call_.branch_count; j++) {
      const Branch &branch = call_.branches()[j];
      if (column < branch.column || branch.column + branch.width <= column) continue;
      for (int64_t i = items_.firsts[b * call_.branch_count + j]; i < items_.firsts[b * call_.branch_count + j + 1]; i++) {
        const Item &item = items_.all[i];
        if (!held_ || held_->branch != item.branch || held_->segment != item.segment)
          ranks_.take(branch.B + item.segment->first * branch.width + column - branch.column, branch.width, item.ranks,
                      width);
        held_ = &item;
        sums.add(item, hidden_ + item.hidden, ranks_);
      }
    }
  }

  // A panel of weights that lie plain.
  const bf16 *pack(int64_t column, int64_t width) const {
    const auto &[x, stride, rows, in, W, layout, members, member_count, y, out_stride, branch_count, threads] = call_;
    bf16 *panel = panel_scratch.get(in * PANEL);
    for (int64_t k = 0; k < in; k += DEPTH)
      if (layout == COLUMNS_OF_W) {
        const bf16 *w = W + k * out_stride + column;
        for (int64_t r = 0; k + DEPTH < in && r < DEPTH; r++) {
          _mm_prefetch(w + (DEPTH + r) * out_stride, _MM_HINT_T0);
          _mm_prefetch(w + (DEPTH + r) * out_stride + DEPTH, _MM_HINT_T0);
        }
        interleave(w, out_stride, DEPTH, width, SIDE, panel + k * PANEL);
      } else {
        const bf16 *w = W + column * in + k;
        for (int64_t r = 0; k + DEPTH < in && r < width; r++) _mm_prefetch(w + r * in + DEPTH, _MM_HINT_T0);
        for (int64_t c = 0; c < PANEL; c += SIDE)
          transpose_tiles(w + c * in, in, width - c, 1, panel + k * PANEL + c * DEPTH);
      }
    return panel;
  }

  const Call &call_;
  const Items &items_;
  const bf16 *hidden_;
  Ranks ranks_;                  // of the item that took them last,
  const Item *held_ = nullptr;  // which is this one
  int64_t chunk_;
  float *unfinished_;
};

}  // namespace

// Whether this process may use what the library was built for.
extern "C" int ready() { return allowed(); }

extern "C" int64_t size_of_call() { return sizeof(Call); }
extern "C" int64_t size_of_branch() { return sizeof(Branch); }
extern "C" int64_t size_of_segment() { return sizeof(Segment); }
extern "C" int64_t size_of_member() { return sizeof(Member); }

extern "C" void linear(const Call *given) {
  const Call &call = *given;
  const Items items(call);
  bf16 *hidden = hidden_scratch.get(items.size);
  const int64_t count = items.all.size();
  const Member &last_member = call.members[call.member_count - 1];
  const int64_t parts = (last_member.panel + tiles(last_member.width, PANEL)) * PARTS;
  const int64_t used = call.rows * call.in * call.out_stride < ALONE ? 1 : call.threads;
#pragma omp parallel num_threads(used)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), blocks = call.blocks();
    Sums sums;
    Product product(call, items, hidden);
    Projection projection(call.x, call.stride, call.rows, call.in, hidden);
    // A thread has all panels for its part of the rows, and waits for nobody, or its part of the panels for all rows.
    const bool by_rows = call.layout == PANELS && blocks >= ENOUGH * threads;
    const int64_t begin = by_rows ? blocks * thread / threads : 0;
    const int64_t end = by_rows ? blocks * (thread + 1) / threads : blocks;
    const int64_t first_item = by_rows ? items.firsts[begin * call.branch_count] : count * thread / threads;
    const int64_t last_item = by_rows ? items.firsts[end * call.branch_count] : count * (thread + 1) / threads;
    for (int64_t i = first_item; i < last_item; i++) projection.project_down(items.all[i], sums);
    if (count && !by_rows) {
#pragma omp barrier
    }
    const int64_t first = by_rows ? 0 : parts * thread / threads;
    const int64_t last = by_rows ? parts : parts * (thread + 1) / threads;
    const Member *m = call.members;
    for (int64_t part = first; part < last;) {
      const int64_t p = part / PARTS, stop = min(last, (p + 1) * PARTS);
      while (p >= m->panel + tiles(m->width, PANEL)) m++;
      const int64_t from = part % PARTS * (PANEL / PARTS), to = (stop - p * PARTS) * (PANEL / PARTS);
      const int64_t within = (p - m->panel) * PANEL + from, width = min(to - from, m->width - within);
      if (width > 0) product.compute(p, from / SIDE, m->column + within, width, begin, end, sums);
      part = stop;
    }
  }
}

// out[s.first:s.last] (+)= h_s x_s for every segment: h its kept values [ranks, rows], x [rows, width], out [R, width].
extern "C" void outer(const bf16 *kept, const bf16 *x, int64_t stride, int64_t width, const Segment *segments,
                      int64_t count, bf16 *out, int64_t adds, int64_t threads) {
  int64_t terms = 0, work = 0;
  for (const Segment *s = segments; s < segments + count; s++) {
    terms = max(terms, kept_rows(*s));
    work += kept_size(*s) * width;
  }
  const int64_t panels = tiles(width, PANEL);
#pragma omp parallel num_threads(work < ALONE ? 1 : threads)
  {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    Sums sums;
    bf16 *right = ranks_scratch.get(terms * PANEL);
    alignas(64) float results[SIDE * PANEL];
    for (int64_t p = panels * thread / all; p < panels * (thread + 1) / all; p++) {
      const int64_t column = p * PANEL, own = min(PANEL, width - column);
      const bf16 *h = kept;
      for (const Segment *s = segments; s < segments + count; h += kept_size(*s++)) {
        const int64_t ranks = s->last - s->first, rows = s->stop - s->start;
        if (!ranks || !rows) continue;
        interleave(x + s->start * stride + column, stride, rows, own, kept_rows(*s) / 2, right);
        for (int64_t r = 0; r < ranks; r += SIDE) {
          const int64_t some = min(ranks - r, SIDE);
          sums.open(results, some, ACROSS, false);
          sums.multiply(h + r * kept_rows(*s), kept_rows(*s), right, kept_rows(*s) / 2);
          sums.close();
          write(results, some, own, out + (s->first + r) * width + column, width, adds);
        }
      }
    }
  }
}
