// Walking a worklist on the CPU: bounds checks before, then runs of entries on all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common.h"
#include "simd.h"

namespace sparseft {

// position / size for any 16-bit position, by one multiplication (exact: position * size < 2^32).
struct Divider {
  explicit Divider(int64_t size) : size(static_cast<uint32_t>(size)), magic((uint64_t{1} << 32) / this->size + 1) {}
  SPARSEFT_INLINE uint32_t quotient(uint32_t position) const { return static_cast<uint32_t>(position * magic >> 32); }
  SPARSEFT_INLINE uint32_t remainder(uint32_t position) const { return position - quotient(position) * size; }
  uint32_t size;
  uint64_t magic;
};

// Active rows (or columns) in their order; without an order, row i is i.
struct Order {
  Order(const std::optional<Tensor>& order, int64_t compact_size)
      : data(order ? order->const_data_ptr<int32_t>() : nullptr),
        size(order ? order->numel() : compact_size) {}
  SPARSEFT_INLINE int64_t operator[](int64_t i) const { return data ? data[i] : i; }
  const int32_t* data;
  int64_t size;
};

struct Shape {
  int64_t rows;
  int64_t cols;
};

inline std::vector<Shape> shapes_of(const std::vector<Tensor>& weights) {
  std::vector<Shape> shapes;
  for (const Tensor& weight : weights) shapes.push_back({weight.size(0), weight.size(1)});
  return shapes;
}

template <typename T>
std::vector<T*> data_of(const std::vector<Tensor>& weights) {
  std::vector<T*> data;
  for (const Tensor& weight : weights) data.push_back(weight.mutable_data_ptr<T>());
  return data;
}

struct Worklist {
  Worklist(const Order& rows, const Order& cols, const Tensor& tiles, const Tensor& local,
           const std::vector<int64_t>& tile)
      : tiles(tile_data(tiles)),
        size(tiles.size(0)),
        local(local_data(local)),
        entries(local.numel()),
        positions(tile[0] * tile[1]),
        width(tile[1]),
        rows(rows),
        cols(cols) {}

  // Throws unless every tile, entry and index is in bounds. shapes[layer] is the matrix that a tile's rows and columns
  // point into; one_shape: all layers share shapes[0].
  void check_bounds(const char* op, const std::vector<Shape>& shapes, bool one_shape = false) const;

  const Tile* tiles;
  int64_t size;
  const uint16_t* local;
  int64_t entries;
  int64_t positions;  // of a tile
  Divider width;      // of a tile
  Order rows;
  Order cols;
};

// Consecutive entries of one tile: the unit of work. Its arithmetic never depends on the number of threads.
struct Run {
  const Tile* tile;
  int64_t first;
  int64_t last;
};

constexpr int64_t kRun = 512;  // entries at most

// All runs of the worklist, in order.
inline std::vector<Run> runs_of(const Worklist& work) {
  std::vector<Run> runs;
  runs.reserve(work.size);
  for (const Tile* tile = work.tiles; tile != work.tiles + work.size; ++tile)
    for (int64_t first = tile->entry0; first < tile->entry1; first += kRun)
      runs.push_back({tile, first, std::min(first + kRun, tile->entry1)});
  return runs;
}

// Calls f(begin, end) for all runs of the worklist, a few neighbouring ones of a layer at a time: together at most kRun
// entries, which lie next to each other. A thread gets about `grain` entries or more. f must not throw.
template <typename F>
void for_each_span(const Worklist& work, int64_t grain, const F& f) {
  const std::vector<Run> runs = runs_of(work);
  std::vector<int64_t> start;  // entries before each run: threads share the entries, not the runs
  start.reserve(runs.size());
  int64_t total = 0;
  for (const Run& run : runs) {
    start.push_back(total);
    total += run.last - run.first;
  }
  torch::stable::parallel_for(0, total, grain, [&](int64_t entry0, int64_t entry1) {
    const auto run_at = [&](int64_t entry) {
      return runs.data() + (std::lower_bound(start.begin(), start.end(), entry) - start.begin());
    };
    const Run *begin = run_at(entry0), *last = run_at(entry1);
    while (begin != last) {
      const Run* end = begin + 1;
      while (end != last && end->first == end[-1].last && end->last - begin->first <= kRun &&
             end->tile->layer == begin->tile->layer)
        ++end;
      f(begin, end);
      begin = end;
    }
  });
}

// Where the entries of neighbouring runs (as of for_each_span) lie in the weights. Each address is asked for at once:
// the lines are far apart, and arrive while the others are worked out.
template <typename T>
void addresses(const Worklist& work, const std::vector<T*>& weights, const std::vector<Shape>& shapes, const Run* begin,
               const Run* end, T** to) {
  const int64_t layer = begin->tile->layer, stride = shapes[layer].cols;
  T* const weight = weights[layer];
  const Divider width = work.width;
  for (const Run* run = begin; run != end; ++run) {
    for (int64_t e = run->first; e < run->last; ++e) {
      const uint32_t row = width.quotient(work.local[e]);
      const uint32_t col = work.local[e] - row * width.size;
      T* address = weight + work.rows[run->tile->row0 + row] * stride + work.cols[run->tile->col0 + col];
      __builtin_prefetch(address, 1);
      *to++ = address;
    }
  }
}

}  // namespace sparseft
