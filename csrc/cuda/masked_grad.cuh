// What the kernels of masked_grad share: the operands, the part of a tile that a block computes, the path for parts
// with few entries, and how the sums reach the entries.
#pragma once

#include "common.cuh"

namespace sparseft {

// grad_out or input: element (t, c) of its active columns is data[t * stride + index[c]].
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
  int64_t width;         // columns of the matrix
  const int32_t* index;  // null: the matrix is compact, column c is c itself
  int64_t active;        // how many c there are

  // -1 where a part reaches beyond the active columns, or into those of another layer.
  __device__ int64_t column(int64_t c) const {
    if (!is_inside(c, active)) return -1;
    const int64_t at = index != nullptr ? index[c] : c;
    return is_inside(at, width) ? at : -1;
  }
};

template <typename T>
struct Problem {
  Operand<T> rows, cols;  // grad_out, input
  int64_t depth;          // T
  Entries entries;
  int64_t few;  // a part with at most so many entries is computed entry by entry
  Wide<T>* out;
  bool accumulate;

  __device__ void add(int64_t entry, Wide<T> sum) const { out[entry] = accumulate ? out[entry] + sum : sum; }
};

__host__ __device__ inline int64_t parts_down(const Entries& entries, int side) {
  return (entries.tile_rows + side - 1) / side;
}

__host__ __device__ inline int64_t parts_across(const Entries& entries, int side) {
  return (entries.tile_cols + side - 1) / side;
}

inline int64_t part_count(const Entries& entries, int side) {
  return entries.tile_count * parts_down(entries, side) * parts_across(entries, side);
}

// The kSide x kSide part of a tile that a block computes.
template <int kSide>
struct Part {
  int64_t row0, col0;      // its first active row and column
  int64_t entry0, entry1;  // its entries lie among these; positions ascend inside a tile
  int row, col;            // its place inside the tile

  __device__ Part(const Entries& entries, int64_t block) {
    const int64_t across = parts_across(entries, kSide), parts = across * parts_down(entries, kSide);
    const Tile tile = entries.tile(block / parts);
    row = static_cast<int>(block % parts / across) * kSide;
    col = static_cast<int>(block % parts % across) * kSide;
    row0 = tile.row0 + row;
    col0 = tile.col0 + col;
    entry0 = tile.entry0;
    entry1 = tile.entry1;
    if (parts > 1) {
      const int last_row = min(row + kSide, entries.tile_rows) - 1, last_col = min(col + kSide, entries.tile_cols) - 1;
      entry1 = first_at(entries, last_row * entries.tile_cols + last_col + 1);
      entry0 = first_at(entries, row * entries.tile_cols + col);
    }
  }

  // The first entry at or behind a position of the tile.
  __device__ int64_t first_at(const Entries& entries, int position) const {
    int64_t low = entry0, high = entry1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (entries.local[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Row and column inside the part; false for an entry of the tile that lies elsewhere.
  __device__ bool find(const Entries& entries, int64_t entry, int& r, int& c) const {
    const unsigned position = entries.local[entry];
    r = entries.row(position) - row;
    c = entries.col(position) - col;
    return r >= 0 && r < kSide && c >= 0 && c < kSide;
  }

  // Whether it has any entry (asked by the whole block).
  __device__ bool is_empty(const Entries& entries) const {
    int r, c;
    bool found = false;
    for (int64_t e = entry0 + threadIdx.x; e < entry1 && !found; e += blockDim.x) found = find(entries, e, r, c);
    return !__syncthreads_or(found);
  }
};

// A part with few entries: each is the dot product of two gathered columns, computed by one warp.
template <typename T, int kSide>
__device__ void sample(const Problem<T>& problem, const Part<kSide>& part) {
  using S = Wide<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int64_t e = part.entry0 + warp; e < part.entry1; e += warps) {
    int r, c;
    if (!part.find(problem.entries, e, r, c)) continue;
    const int64_t row = problem.rows.column(part.row0 + r), col = problem.cols.column(part.col0 + c);
    if (row < 0 || col < 0) continue;
    S sum = 0;
    for (int64_t t = lane; t < problem.depth; t += kWarp) {
      sum += static_cast<S>(problem.rows.data[t * problem.rows.stride + row]) *
             static_cast<S>(problem.cols.data[t * problem.cols.stride + col]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    if (lane == 0) problem.add(e, sum);
  }
}

// Gives the entries in rows [first, first + kRows) of the part their sums.
template <typename T, int kSide, int kRows, int kPitch>
__device__ void hand_out(const Problem<T>& problem, const Part<kSide>& part, int first,
                         const Wide<T> (&sums)[kRows][kPitch]) {
  int r, c;
  for (int64_t e = part.entry0 + threadIdx.x; e < part.entry1; e += blockDim.x) {
    if (part.find(problem.entries, e, r, c) && r >= first && r < first + kRows) problem.add(e, sums[r - first][c]);
  }
}

}  // namespace sparseft
