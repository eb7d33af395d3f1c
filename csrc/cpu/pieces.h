// The entries of all layers, a small piece at a time, with their weights' cache lines asked for well before.
//
// The lines are far apart: no hardware prefetcher finds them. A core has only some dozens of requests to memory under
// way, and twice as many where they end in the second-level cache: there they are asked for, some pieces ahead of the
// one that is worked on.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "phases.h"
#include "places.h"
#include "worklist.h"

namespace sparseft {

constexpr int64_t kPiece = 128;  // entries at most: the work around each is little beside that
constexpr int64_t kAhead = 2;    // pieces whose lines are under way or there: 16 KiB of that cache

// Neighbouring entries of a layer, and where they lie in its weight.
template <typename T>
struct Piece {
  int64_t layer;
  int64_t first;
  int64_t count;
  T* at[kPiece + kAtOnce];  // the last are scratch
};

// The pieces of the tiles [begin, end), in order.
template <typename T>
class Pieces {
 public:
  Pieces(const Worklist& work, const std::vector<T*>& weights, const std::vector<Shape>& shapes, const Tile* begin,
         const Tile* end)
      : work_(work),
        weights_(weights),
        shapes_(shapes),
        together_(has_avx512() && work.width.size <= kSide && work.positions / work.width.size <= kSide),
        tile_(begin),
        end_(end) {
    if (tile_ != end_) entry_ = tile_->entry0;
  }

  // Makes the next piece and asks for its lines; false if there is none.
  bool next(Piece<T>& piece) {
    while (tile_ != end_ && entry_ == tile_->entry1) go_on();
    if (tile_ == end_) return false;
    piece.layer = tile_->layer;
    piece.first = entry_;
    piece.count = 0;
    do {
      const int64_t last = std::min(tile_->entry1, entry_ + kPiece - piece.count);
      ask_for(entry_, last, piece.at + piece.count);
      piece.count += last - entry_;
      entry_ = last;
      if (last < tile_->entry1) break;
      go_on();
    } while (tile_ != end_ && piece.count < kPiece && entry_ == piece.first + piece.count &&
             tile_->layer == piece.layer);
    return true;
  }

 private:
  void go_on() {
    if (++tile_ != end_) entry_ = tile_->entry0;
  }

  void ask_for(int64_t first, int64_t last, T** to) const {
    if (first == last) return;  // a tile without entries may point anywhere
    const Shape& shape = shapes_[tile_->layer];
    const Site<T> site{weights_[tile_->layer],
                       shape.cols,
                       work_.rows.data + tile_->row0,
                       work_.rows.size - tile_->row0,
                       work_.cols.data + tile_->col0,
                       work_.cols.size - tile_->col0,
                       work_.width};
#ifdef SPARSEFT_X86
    if (together_ && shape.rows * shape.cols < int64_t{1} << 31)
      return place_together(site, work_.local + first, last - first, to);
#endif
    place(site, work_.local + first, last - first, to);
  }

  const Worklist& work_;
  const std::vector<T*>& weights_;
  const std::vector<Shape>& shapes_;
  const bool together_;  // whether tiles are small enough for place_together, and the processor has its vectors
  const Tile *tile_, *end_;
  int64_t entry_ = 0;  // of tile_
};

// Calls f(piece) for all entries of a worklist with rows and cols, from several threads if there are more than `few`.
// f must not throw.
template <typename T, typename F>
void for_each_piece(const Worklist& work, const std::vector<T*>& weights, const std::vector<Shape>& shapes, int64_t few,
                    const F& f) {
  // Tiles that a thread takes at a time: 50 microseconds at most. Equal shares, given out before, would wait for the
  // thread whose core or memory was slower.
  const int64_t batch = 1 + work.size * (1 << 14) / std::max<int64_t>(1, work.entries);
  Phases phases({{work.size, batch}});
  const int64_t threads = work.entries > few ? torch::stable::get_num_threads() : 1;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    phases.join([&](int64_t, int64_t begin, int64_t end) {
      Pieces<T> pieces(work, weights, shapes, work.tiles + begin, work.tiles + end);
      Piece<T> ring[kAhead];
      int64_t made = 0;
      while (made < kAhead && pieces.next(ring[made])) ++made;
      for (int64_t done = 0; done < made; ++done) {
        f(ring[done % kAhead]);
        if (pieces.next(ring[made % kAhead])) ++made;  // in the place of the one that is done
      }
    });
  });
}

}  // namespace sparseft
