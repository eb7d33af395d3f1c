// A worklist on the CPU: bounds checks, and its runs of entries.
#pragma once

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

inline std::vector<Shape> shapes_of(const std::vector<Tensor>& weights) {
  std::vector<Shape> shapes;
  for (const Tensor& weight : weights) shapes.push_back(matrix_shape(weight));
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

// Consecutive entries of one tile, which one thread takes: no arithmetic depends on the number of threads.
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

}  // namespace sparseft
