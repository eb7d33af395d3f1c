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

// Whether `count` indices lie in [0, limit): negative ones are the largest without their sign.
SPARSEFT_CLONES bool all_below(const int32_t* values, int64_t count, int64_t limit) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(values[i]));
  return count == 0 || most < std::min(limit, int64_t{1} << 31);
}

// How far the indices of an order lie in a layer's matrix. Tiles of a band share their rows, bands share their columns:
// what was found last is kept.
class Known {
 public:
  // How many of order[start], ..., order[start + count - 1] there are and lie in [0, limit), before the first that does
  // not.
  int64_t fitting(const Order& order, int64_t layer, int64_t start, int64_t count, int64_t limit) {
    if (start < 0 || start >= order.size) return 0;
    const int64_t last = start + std::min(count, order.size - start);
    if (!order.data) return std::max<int64_t>(0, std::min(last, limit) - start);
    if (layer != layer_ || start < begin_ || start > end_) {
      layer_ = layer;
      begin_ = end_ = start;
      ends_ = false;
    }
    if (last > end_ && !ends_) go_on(order, last, limit);
    return std::min(last, end_) - start;
  }

 private:
  void go_on(const Order& order, int64_t last, int64_t limit) {
    if (all_below(order.data + end_, last - end_, limit)) {
      end_ = last;
      return;
    }
    while (order[end_] >= 0 && order[end_] < limit) ++end_;
    ends_ = true;
  }

  int64_t layer_ = -1, begin_ = 0, end_ = 0;  // all of order[begin], ..., order[end - 1] fit
  bool ends_ = false;                         // order[end] does not
};

class Checker {
 public:
  // all_inside: every position of the worklist lies inside a tile.
  Checker(const Worklist& work, const std::vector<Shape>& shapes, bool one_shape, bool all_inside)
      : work_(work),
        shapes_(shapes),
        one_shape_(one_shape),
        all_inside_(all_inside),
        width_(work.width.size),
        height_(work.positions / width_) {}

  // What is wrong with a tile, or nullptr.
  const char* fault(const Tile& tile) {
    const int64_t layer = one_shape_ ? 0 : tile.layer;
    if (layer < 0 || layer >= static_cast<int64_t>(shapes_.size())) return "LAYER is not one of the weights";
    if (tile.entry0 < 0 || tile.entry1 < tile.entry0 || tile.entry1 > work_.entries)
      return "ENTRY0 and ENTRY1 must be an ascending range of entries";
    if (tile.entry0 == tile.entry1) return nullptr;
    const Shape& shape = shapes_[layer];
    const int64_t rows = rows_.fitting(work_.rows, layer, tile.row0, height_, shape.rows);
    const int64_t cols = cols_.fitting(work_.cols, layer, tile.col0, width_, shape.cols);
    if (all_inside_ && rows == height_ && cols == width_) return nullptr;
    const uint16_t* local = work_.local + tile.entry0;
    const int64_t count = tile.entry1 - tile.entry0;
    const int64_t most = largest(local, count);
    if (most >= work_.positions) return "a local position lies outside the tile";
    if (most >= rows * width_)
      return exists(tile.row0, most / width_, work_.rows) ? "rows holds an index outside the matrix"
                                                          : "an entry lies outside the active rows";
    if (cols == width_) return nullptr;
    const int64_t right = largest_column(local, count, work_.width);
    if (right < cols) return nullptr;
    return exists(tile.col0, right, work_.cols) ? "cols holds an index outside the matrix"
                                                : "an entry lies outside the active columns";
  }

 private:
  static bool exists(int64_t start, int64_t number, const Order& order) {
    return start >= 0 && start < order.size - number;
  }

  const Worklist& work_;
  const std::vector<Shape>& shapes_;
  bool one_shape_, all_inside_;
  int64_t width_, height_;  // of a tile
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
