#include "worklist.h"

#include <atomic>

namespace sparseft {
namespace {

// The largest of `count` >= 1 positions.
SPARSEFT_CLONES uint16_t largest(const uint16_t* local, int64_t count) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, local[i]);
  return most;
}

SPARSEFT_CLONES uint32_t largest_column(const uint16_t* local, int64_t count, Divider width) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, width.remainder(local[i]));
  return most;
}

SPARSEFT_CLONES bool all_below(const int32_t* values, int64_t count, int64_t limit) {
  bool ok = true;
  for (int64_t i = 0; i < count; ++i) ok &= values[i] >= 0 && values[i] < limit;
  return ok;
}

// The stretch of an order whose indices were last found to lie in a layer's matrix: tiles of a band share their rows,
// bands share their columns.
class Known {
 public:
  bool fits(const Order& order, int64_t layer, int64_t start, int64_t count, int64_t limit) {
    if (!order.data) return start + count <= limit;
    const bool continues = layer == layer_ && begin_ <= start && start <= end_;
    const int64_t from = continues ? std::min(end_, start + count) : start;
    if (!all_below(order.data + from, start + count - from, limit)) return false;
    begin_ = continues ? begin_ : start;
    end_ = continues ? std::max(end_, start + count) : start + count;
    layer_ = layer;
    return true;
  }

 private:
  int64_t layer_ = -1, begin_ = 0, end_ = 0;
};

class Checker {
 public:
  // all_inside: every position of the worklist lies inside a tile.
  Checker(const Worklist& work, const std::vector<Shape>& shapes, bool one_shape, bool all_inside)
      : work_(work),
        shapes_(shapes),
        one_shape_(one_shape),
        all_inside_(all_inside) {}

  // What is wrong with a tile, or nullptr.
  const char* fault(const Tile& tile) {
    const int64_t layer = layer_of(tile);
    if (layer < 0 || layer >= static_cast<int64_t>(shapes_.size())) return "LAYER is not one of the weights";
    if (tile.entry0 < 0 || tile.entry1 < tile.entry0 || tile.entry1 > work_.entries)
      return "ENTRY0 and ENTRY1 must be an ascending range of entries";
    const uint16_t* local = work_.local + tile.entry0;
    const int64_t count = tile.entry1 - tile.entry0;
    if (count == 0 || (all_inside_ && fits_whole(tile, shapes_[layer]))) return nullptr;
    const uint16_t most = largest(local, count);
    if (most >= work_.positions) return "a local position lies outside the tile";
    const int64_t rows = work_.width.quotient(most) + 1;
    // All columns of the tile, if there are so many; else those that its entries use.
    const bool whole = tile.col0 >= 0 && tile.col0 <= work_.cols.size - int64_t{work_.width.size};
    int64_t cols = whole ? work_.width.size : largest_column(local, count, work_.width) + 1;
    if (tile.row0 < 0 || tile.row0 > work_.rows.size - rows) return "an entry lies outside the active rows";
    if (tile.col0 < 0 || tile.col0 > work_.cols.size - cols) return "an entry lies outside the active columns";
    const Shape& shape = shapes_[layer];
    if (!rows_.fits(work_.rows, layer, tile.row0, rows, shape.rows)) return "rows holds an index outside the matrix";
    if (cols_.fits(work_.cols, layer, tile.col0, cols, shape.cols)) return nullptr;
    cols = largest_column(local, count, work_.width) + 1;
    if (cols_.fits(work_.cols, layer, tile.col0, cols, shape.cols)) return nullptr;
    return "cols holds an index outside the matrix";
  }

 private:
  // Whether all rows and columns of the tile exist and lie in the matrix: then so do those that its entries use.
  bool fits_whole(const Tile& tile, const Shape& shape) {
    const int64_t width = work_.width.size, height = work_.positions / width;
    return tile.row0 >= 0 && tile.row0 <= work_.rows.size - height && tile.col0 >= 0 &&
           tile.col0 <= work_.cols.size - width &&
           rows_.fits(work_.rows, layer_of(tile), tile.row0, height, shape.rows) &&
           cols_.fits(work_.cols, layer_of(tile), tile.col0, width, shape.cols);
  }

  int64_t layer_of(const Tile& tile) const { return one_shape_ ? 0 : tile.layer; }

  const Worklist& work_;
  const std::vector<Shape>& shapes_;
  bool one_shape_, all_inside_;
  Known rows_, cols_;
};

}  // namespace

void Worklist::check_bounds(const char* op, const std::vector<Shape>& shapes, bool one_shape) const {
  std::atomic<bool> all_inside{true};
  torch::stable::parallel_for(0, entries, 1 << 18, [&](int64_t begin, int64_t end) {
    if (begin < end && largest(local + begin, end - begin) >= positions) all_inside = false;
  });
  std::atomic<int64_t> first_bad{size};
  torch::stable::parallel_for(0, size, 1024, [&](int64_t begin, int64_t end) {
    Checker checker(*this, shapes, one_shape, all_inside);
    for (int64_t i = begin; i < end; ++i) {
      if (!checker.fault(tiles[i])) continue;
      int64_t before = first_bad.load();
      while (i < before && !first_bad.compare_exchange_weak(before, i)) {
      }
      return;
    }
  });
  const int64_t bad = first_bad.load();
  STD_TORCH_CHECK(bad == size, op, ": tile ", bad, ": ",
                  Checker(*this, shapes, one_shape, all_inside).fault(tiles[bad]));
}

}  // namespace sparseft
