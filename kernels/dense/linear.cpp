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
constexpr int64_t WIDE = 4 * PANEL;  // columns of rows that are read at a time,
constexpr int64_t AHEAD = 8;         // and for how many rows before they are needed

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
  const Call *next;  // whose weights are wanted after these, or null

  const Branch *branches() const { return reinterpret_cast<const Branch *>(this + 1); }
  int64_t blocks() const { return tiles(rows, SIDE); }

  // Of all panels, which threads have equal shares of.
  int64_t parts() const {
    const Member &last = members[member_count - 1];
    return (last.panel + tiles(last.width, PANEL)) * PARTS;
  }

  // Where a thread begins to read packed panels.
  const bf16 *first(int64_t thread, int64_t count) const {
    const int64_t part = parts() * thread / count;
    return W + part / PARTS * in * PANEL + part % PARTS * (ACROSS / PARTS) * TILE;
  }
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

  // Columns [column, column + width) of y for blocks [begin, end), from panel p, of which they begin at tile t; `wanted`
  // is what the thread reads next.
  void compute(int64_t p, int64_t t, int64_t column, int64_t width, int64_t begin, int64_t end, const bf16 *wanted,
               Sums &sums) {
    const auto &[x, stride, rows, in, W, layout, members, member_count, y, out_stride, branch_count, threads, next] =
        call_;
    const int64_t across = tiles(width, DEPTH) * (DEPTH / SIDE);
    const bf16 *weights = layout == PANELS ? W + p * in * PANEL + t * TILE : pack(column, width);
    const int64_t ahead = layout == PANELS && end - begin == 1 && wanted ? wanted - weights : 0;
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
    const auto &[x, stride, rows, in, W, layout, members, member_count, y, out_stride, branch_count, threads, next] =
        call_;
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

// out[s.first:s.last] (+)= h_s x_s for every segment: h its kept values [ranks, rows], x [rows, width], out [R, width].
struct Outer {
  const bf16 *kept, *x;
  int64_t stride, width;
  const Segment *segments;
  int64_t count;
  bf16 *out;
  int64_t adds;
};

// What is one thread's of one: columns from `column` on, of segments [first, last), whose kept values begin at `kept`.
struct Part {
  const Outer *outer;
  const Segment *first, *last;
  const bf16 *kept;
  int64_t column;

  void compute(bf16 *right, Sums &sums) const {
    const auto &[all, x, stride, width, segments, count, out, adds] = *outer;
    const int64_t panels = tiles(min(width - column, WIDE), PANEL);
    alignas(64) float results[SIDE * PANEL];
    const bf16 *h = kept;
    for (const Segment *s = first; s < last; h += kept_size(*s++)) {
      const int64_t ranks = s->last - s->first, rows = s->stop - s->start, pairs = kept_rows(*s) / 2;
      if (!ranks || !rows) continue;
      for (int64_t pair = 0; pair < pairs; pair++)  // whole rows, as they lie in memory
        for (int64_t p = 0; p < panels; p++) {
          const bf16 *two = x + (s->start + 2 * pair) * stride + column + p * PANEL;
          for (const bf16 *row : {two + AHEAD * stride, two + (AHEAD + 1) * stride}) {
            _mm_prefetch(row, _MM_HINT_T0);
            _mm_prefetch(row + DEPTH, _MM_HINT_T0);
          }
          interleave(two, stride, rows - 2 * pair, width - column - p * PANEL, 1,
                     right + p * pairs * 2 * PANEL + pair / SIDE * ACROSS * TILE + pair % SIDE * DEPTH);
        }
      for (int64_t p = 0; p < panels; p++)
        for (int64_t r = 0; r < ranks; r += SIDE) {
          const int64_t some = min(ranks - r, SIDE), place = column + p * PANEL;
          sums.open(results, some, ACROSS, false);
          sums.multiply(h + r * kept_rows(*s), kept_rows(*s), right + p * pairs * 2 * PANEL, pairs);
          sums.close();
          write(results, some, min(PANEL, width - place), out + (s->first + r) * width + place, width, adds);
        }
    }
  }
};

}  // namespace

// Whether this process may use what the library was built for.
extern "C" int ready() { return allowed(); }

extern "C" int64_t size_of_call() { return sizeof(Call); }
extern "C" int64_t size_of_branch() { return sizeof(Branch); }
extern "C" int64_t size_of_segment() { return sizeof(Segment); }
extern "C" int64_t size_of_member() { return sizeof(Member); }
extern "C" int64_t size_of_outer() { return sizeof(Outer); }

extern "C" void linear(const Call *given) {
  const Call &call = *given;
  const Items items(call);
  bf16 *hidden = hidden_scratch.get(items.size);
  const int64_t count = items.all.size();
  const int64_t parts = call.parts();
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
      const bf16 *wanted = call.next ? call.next->first(thread, threads) : nullptr;
      if (stop < last) wanted = call.W + (p + 1) * call.in * PANEL;
      if (width > 0) product.compute(p, from / SIDE, m->column + within, width, begin, end, wanted, sums);
      part = stop;
    }
  }
}

extern "C" void outers(const Outer *all, int64_t count, int64_t threads) {
  std::vector<Part> parts;
  int64_t terms = 0, work = 0;
  for (const Outer *own = all; own < all + count; own++)
    for (int64_t column = 0; column < own->width; column += WIDE) {
      const Segment *end = own->segments + own->count;
      const bf16 *kept = own->kept;
      if (own->adds) parts.push_back({own, own->segments, end, kept, column});  // in their order
      for (const Segment *s = own->segments; s < end; kept += kept_size(*s++)) {
        if (!own->adds) parts.push_back({own, s, s + 1, kept, column});
        terms = max(terms, kept_rows(*s));
        work += kept_size(*s) * min(own->width - column, WIDE);
      }
    }
#pragma omp parallel num_threads(work < ALONE ? 1 : threads)
  {
    Sums sums;
    bf16 *right = ranks_scratch.get(terms * WIDE);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); i++) parts[i].compute(right, sums);
  }
}
