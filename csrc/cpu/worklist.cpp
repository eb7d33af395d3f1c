#include "worklist.h"

#include <atomic>

namespace sparseft {
namespace {

// One more than the largest position, and than the largest column, of these entries (0, 0 for none).
struct Extent {
  uint32_t positions;
  uint32_t cols;
};

SPARSEFT_CLONES Extent extent(const uint16_t* local, int64_t count, Divider width) {
  Extent most{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    most.positions = std::max<uint32_t>(most.positions, local[i] + 1u);
    most.cols = std::max(most.cols, width.remainder(local[i]) + 1u);
  }
  return most;
}

SPARSEFT_CLONES bool all_below(const int32_t* values, int64_t count, int64_t limit) {
  bool ok = true;
  for (int64_t i = 0; i < count; ++i) ok &= values[i] >= 0 && values[i] < limit;
  return ok;
}

bool order_fits(const Order& order, int64_t start, int64_t count, int64_t limit) {
  return order.data ? all_below(order.data + start, count, limit) : start + count <= limit;
}

// What is wrong with a tile, or nullptr.
const char* fault(const Worklist& work, const Tile& tile, const std::vector<Shape>& shapes, bool one_shape) {
  if (!one_shape && (tile.layer < 0 || tile.layer >= static_cast<int64_t>(shapes.size())))
    return "LAYER is not one of the weights";
  if (tile.entry0 < 0 || tile.entry1 < tile.entry0 || tile.entry1 > work.entries)
    return "ENTRY0 and ENTRY1 must be an ascending range of entries";
  const Extent most = extent(work.local + tile.entry0, tile.entry1 - tile.entry0, work.width);
  if (most.positions == 0) return nullptr;
  if (most.positions > work.positions) return "a local position lies outside the tile";
  const int64_t rows = work.width.quotient(most.positions - 1) + 1;
  const int64_t cols = most.cols;
  if (tile.row0 < 0 || tile.row0 > work.rows.size - rows) return "an entry lies outside the active rows";
  if (tile.col0 < 0 || tile.col0 > work.cols.size - cols) return "an entry lies outside the active columns";
  const Shape& shape = shapes[one_shape ? 0 : tile.layer];
  if (!order_fits(work.rows, tile.row0, rows, shape.rows)) return "rows holds an index outside the matrix";
  if (!order_fits(work.cols, tile.col0, cols, shape.cols)) return "cols holds an index outside the matrix";
  return nullptr;
}

}  // namespace

void Worklist::check_bounds(const char* op, const std::vector<Shape>& shapes, bool one_shape) const {
  std::atomic<int64_t> first_bad{size};
  torch::stable::parallel_for(0, size, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!fault(*this, tiles[i], shapes, one_shape)) continue;
      int64_t before = first_bad.load();
      while (i < before && !first_bad.compare_exchange_weak(before, i)) {
      }
      return;
    }
  });
  const int64_t bad = first_bad.load();
  STD_TORCH_CHECK(bad == size, op, ": tile ", bad, ": ", fault(*this, tiles[bad], shapes, one_shape));
}

}  // namespace sparseft
