// The two operations that walk the entries in their stored order (scatter_delta_, sparse_adamw_): four neighbouring
// entries at a time, so that everything kept per entry moves in 16-byte accesses.
#pragma once

#include "common.cuh"

namespace sparseft {

constexpr int kQuad = 4;
constexpr int kEntryThreads = 256;

template <typename W>
struct Weight {
  W* data;
  int64_t rows, cols;
};

template <typename W>
Table<Weight<W>> make_weights(Call& call, const std::vector<Tensor>& weights) {
  std::vector<Weight<W>> records;
  for (const Tensor& weight : weights) {
    const Shape shape = matrix_shape(weight);
    records.push_back({call.output<W>(weight), shape.rows, shape.cols});
  }
  return make_table(call, records);
}

// Blocks of a launch in which every thread takes `quads` quads.
inline int64_t entry_blocks(const Entries& entries, int quads) {
  const int64_t each = kEntryThreads * kQuad * quads;
  return entries.tile_count == 0 ? 0 : (entries.count + each - 1) / each;
}

constexpr unsigned kAllActive = (1u << kQuad) - 1;

// Four neighbouring entries; bit i of `active` says that entry + i is in the worklist.
struct Quad {
  int64_t entry;
  unsigned active = 0;
  bool vector = false;  // all four are, and the arrays are aligned

  template <typename T>
  __device__ void read(T (&to)[kQuad], const T* from) const {
    if (vector) {
      const auto four = load(reinterpret_cast<const Vec<T, kQuad>*>(from + entry));
      for (int i = 0; i < kQuad; ++i) to[i] = four.at[i];
    } else {
      for (int i = 0; i < kQuad; ++i) {
        if (active >> i & 1) to[i] = from[entry + i];
      }
    }
  }

  template <typename T>
  __device__ void write(T* to, const T (&from)[kQuad]) const {
    if (vector) {
      Vec<T, kQuad> four;
      for (int i = 0; i < kQuad; ++i) four.at[i] = from[i];
      store(reinterpret_cast<Vec<T, kQuad>*>(to + entry), four);
    } else {
      for (int i = 0; i < kQuad; ++i) {
        if (active >> i & 1) to[entry + i] = from[i];
      }
    }
  }
};

// Walks the worklist forwards, keeping the tile it stands on.
struct Cursor {
  int64_t number;
  Tile tile;

  __device__ Cursor(const Entries& entries, int64_t number) : number(number) { take(entries); }

  __device__ void take(const Entries& entries) {
    if (number < entries.tile_count) {
      tile = entries.tile(number);
    } else {
      tile = {0, 0, 0, INT64_MAX, INT64_MAX};
    }
  }

  // Whether `entry` is in the worklist; then `tile` is its tile.
  __device__ bool find(const Entries& entries, int64_t entry) {
    while (tile.entry1 <= entry) {
      ++number;
      take(entries);
    }
    return tile.entry0 <= entry;
  }
};

// Four neighbouring entries and where they lie; `weight` is null outside the worklist.
template <typename W>
struct Located {
  Quad quad;
  W* weight[kQuad] = {};
  int32_t layer[kQuad] = {};

  __device__ void locate(const Entries& entries, const Table<Weight<W>>& weights, Cursor& cursor, int64_t first,
                         bool aligned) {
    int64_t row0[kQuad] = {}, col0[kQuad] = {};
    quad.entry = first;
    for (int i = 0; i < kQuad; ++i) {
      if (!cursor.find(entries, first + i)) continue;
      quad.active |= 1u << i;
      layer[i] = static_cast<int32_t>(is_inside(cursor.tile.layer, weights.count) ? cursor.tile.layer : -1);
      row0[i] = cursor.tile.row0;
      col0[i] = cursor.tile.col0;
    }
    quad.vector = aligned && quad.active == kAllActive;
    uint16_t position[kQuad] = {};
    quad.read(position, entries.local);
    int64_t row[kQuad], col[kQuad];
    for (int i = 0; i < kQuad; ++i) {  // all eight reads are under way together
      const int64_t r = row0[i] + entries.row(position[i]), c = col0[i] + entries.col(position[i]);
      const bool there = (quad.active >> i & 1) && is_inside(r, entries.row_count) && is_inside(c, entries.col_count);
      row[i] = there ? entries.rows[r] : -1;
      col[i] = there ? entries.cols[c] : -1;
    }
    for (int i = 0; i < kQuad; ++i) {
      if (layer[i] >= 0 && row[i] >= 0) {
        const Weight<W>& owner = weights[layer[i]];
        if (is_inside(row[i], owner.rows) && is_inside(col[i], owner.cols)) {
          weight[i] = owner.data + row[i] * owner.cols + col[i];
        }
      }
      if (weight[i] == nullptr) quad.active &= ~(1u << i);
    }
    quad.vector = aligned && quad.active == kAllActive;
  }
};

// Finds this thread's quads: neighbouring lanes have neighbouring quads.
template <typename W, int kQuads>
__device__ void locate_quads(Located<W> (&at)[kQuads], const Entries& entries, const Table<Weight<W>>& weights,
                             bool aligned) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = thread / kWarp * (kWarp * kQuad * kQuads);
  Cursor cursor(entries, first_tile(entries, first));
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    at[q].locate(entries, weights, cursor, first + (q * kWarp + thread % kWarp) * kQuad, aligned);
  }
}

}  // namespace sparseft
