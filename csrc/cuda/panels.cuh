// masked_grad where tiles hold few entries: only the columns that have one are multiplied. bf16 and fp16, tensor cores.
//
// A block takes sixteen rows (a panel) of several neighbouring tiles. It marks the columns with an entry there and
// multiplies them with the panel, 64 at a time (a chunk). Both operands lie by columns: the tokens of a gathered column
// are neighbours, and move in segments of 128 bytes.
#pragma once

#include "masked_grad.cuh"

namespace sparseft {
namespace panels {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPanel = 16;               // rows
constexpr int kChunk = kWarps * 16;      // columns; 16 for each warp
constexpr int kLines = kChunk + kPanel;  // columns of operands that a block multiplies at once
constexpr int kDepth = 64;               // t per stage
constexpr int kStages = 3;               // two are being copied while one is multiplied
constexpr int kPiece = 8;                // neighbouring t that move at once: 16 bytes
constexpr int kWords = 256;              // of 32 columns each, in the tiles of a block
constexpr int kTogether = 8;             // threads that read the entries of one tile
constexpr int kTurned = 64;              // rows and columns of the squares in which a matrix is transposed

__host__ __device__ constexpr int words_of(int tile_cols) {
  return (tile_cols + 31) / 32;
}

// A stage of the lines. Pieces are exchanged inside a line so that the eight which ldmatrix reads together lie in
// different banks.
struct Stage {
  Vec<uint16_t, kPiece> pieces[kLines][kDepth / kPiece];

  __device__ Vec<uint16_t, kPiece>* at(int line, int t) { return &pieces[line][(t / kPiece) ^ (line % 8)]; }
};

struct Memory {
  union {
    Stage stages[kStages];
    float sums[kPanel][kChunk + 1];
  };
  int64_t lines[kLines];    // where the chunk's columns of input and the panel's of grad_out begin; -1: none
  uint32_t marked[kWords];  // a bit for each column of the tiles: it has an entry in the panel
  int before[kWords];       // how many are marked in the words before
};

// The panel of one or more neighbouring tiles of the worklist that have the same rows.
struct Band {
  int64_t first, end;  // tiles
  int64_t row0;        // of the panel, among the active rows
  int row;             // of the panel, in its tiles
  int words;           // of marks in each tile

  __device__ Band(const Entries& entries, int64_t first, int64_t limit, int row)
      : first(first),
        row(row),
        words(words_of(entries.tile_cols)) {
    const int64_t tiles_row0 = entries.tile(first).row0;
    row0 = tiles_row0 + row;
    unsigned same = kWholeWarp;
    for (end = first; end < limit && same == kWholeWarp;) {
      const int64_t mine = end + threadIdx.x % kWarp;
      same = __ballot_sync(kWholeWarp, mine < limit && entries.tile(mine).row0 == tiles_row0);
      end += same == kWholeWarp ? kWarp : __ffs(~same) - 1;
    }
  }

  // Calls f(entry, row in the panel, word, bit) for this thread's share of the panel's entries.
  template <typename F>
  __device__ void for_each_entry(const Entries& entries, const F& f) const {
    for (int64_t number = first + threadIdx.x / kTogether; number < end; number += kThreads / kTogether) {
      const Tile tile = entries.tile(number);
      for (int64_t e = tile.entry0 + threadIdx.x % kTogether; e < tile.entry1; e += kTogether) {
        const unsigned position = entries.local[e];
        const int r = entries.row(position) - row, c = entries.col(position);
        if (is_inside(r, kPanel)) f(e, r, static_cast<int>(number - first) * words + c / 32, c % 32);
      }
    }
  }
};

// Marks the columns that have an entry; returns how many there are.
__device__ inline int mark(const Entries& entries, const Band& band, Memory& shared) {
  const int words = static_cast<int>(band.end - band.first) * band.words;
  for (int i = threadIdx.x; i < words; i += kThreads) shared.marked[i] = 0;
  __syncthreads();
  band.for_each_entry(entries, [&](int64_t, int, int word, int bit) { atomicOr(&shared.marked[word], 1u << bit); });
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += kThreads) {
    int sum = 0;
    for (int j = 0; j < i; ++j) sum += __popc(shared.marked[j]);
    shared.before[i] = sum;
  }
  __syncthreads();
  return shared.before[words - 1] + __popc(shared.marked[words - 1]);
}

// Finds the lines of the marked columns number [begin, begin + kChunk) and of the panel.
template <typename T>
__device__ void find_lines(const Problem<T>& problem, const Band& band, int begin, int total, Memory& shared) {
  const auto line = [](const Operand<T>& operand, int64_t c) {
    const int64_t column = operand.column(c);
    return column < 0 ? -1 : column * operand.stride;
  };
  const int words = static_cast<int>(band.end - band.first) * band.words;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const int64_t col0 = problem.entries.tile(band.first + i / band.words).col0 + i % band.words * 32;
    int place = shared.before[i] - begin;
    for (uint32_t left = shared.marked[i]; left != 0; left &= left - 1, ++place) {
      if (is_inside(place, kChunk)) shared.lines[place] = line(problem.cols, col0 + __ffs(left) - 1);
    }
  }
  for (int i = total - begin + threadIdx.x; i < kChunk; i += kThreads) shared.lines[i] = -1;
  if (threadIdx.x < kPanel) shared.lines[kChunk + threadIdx.x] = line(problem.rows, band.row0 + threadIdx.x);
}

// Brings [t0, t0 + kDepth) of the lines into a stage; zeros beyond the edges.
template <typename T>
__device__ void fetch(const Problem<T>& problem, int64_t t0, const int64_t (&lines)[kLines], Stage& stage) {
  for (int i = threadIdx.x; i < kLines * (kDepth / kPiece); i += kThreads) {
    const int number = i / (kDepth / kPiece), t = i % (kDepth / kPiece) * kPiece;
    const T* data = number < kChunk ? problem.cols.data : problem.rows.data;
    const int64_t line = lines[number], left = line < 0 ? 0 : problem.depth - t0 - t;
    const int count = left < 0 ? 0 : left < kPiece ? static_cast<int>(left) : kPiece;
    copy_async(stage.at(number, t), count > 0 ? data + line + t0 + t : data, count * static_cast<int>(sizeof(T)));
  }
}

// sums[r][c] = the product of the panel's row r and the chunk's column c.
template <typename T>
__device__ void multiply(const Problem<T>& problem, Memory& shared) {
  const auto fetch_stage = [&](int64_t number) {
    if (number * kDepth < problem.depth) {
      fetch(problem, number * kDepth, shared.lines, shared.stages[number % kStages]);
    }
    commit_copies();  // an empty group past the end keeps the count right
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch_stage(i);

  const int lane = threadIdx.x % kWarp, c0 = threadIdx.x / kWarp * 16;
  float sums[2][4] = {};
  for (int64_t i = 0; i * kDepth < problem.depth; ++i) {
    wait_for_copies<kStages - 2>();  // groups past the end are empty: the last of these waits for all that is left
    __syncthreads();  // stage i is there for all, and all have done with stage i - 1, whose place is filled next
    fetch_stage(i + kStages - 1);
    Stage& stage = shared.stages[i % kStages];
    for (int t = 0; t < kDepth; t += 16) {
      uint32_t a[4], b[4];  // t runs along the rows of the 8 x 8 matrices, as the products want them
      load_matrices_plain(a, stage.at(kChunk + lane % 16, t + lane / 16 * 8));
      load_matrices_plain(b, stage.at(c0 + lane % 8 + lane / 16 * 8, t + lane / 8 % 2 * 8));
      for (int n = 0; n < 2; ++n) multiply_add<T>(sums[n], a, {b[2 * n], b[2 * n + 1]});
    }
  }
  __syncthreads();  // the memory of the stages is free
  for (int n = 0; n < 2; ++n) {
    for (int j = 0; j < 4; ++j) {
      shared.sums[lane / 4 + j / 2 * 8][c0 + n * 8 + lane % 4 * 2 + j % 2] = sums[n][j];
    }
  }
}

// A block: one panel of `together` tiles. The operands lie by columns: `stride` is from one column to the next.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) masked_grad(Problem<T> problem, int together) {
  auto& shared = shared_memory<Memory>();
  const Entries& entries = problem.entries;
  const int64_t panels = parts_down(entries, kPanel), group = blockIdx.x / panels * together;
  const int64_t limit = min(group + together, entries.tile_count);
  for (int64_t first = group; first < limit;) {
    const Band band(entries, first, limit, static_cast<int>(blockIdx.x % panels) * kPanel);
    first = band.end;
    const int total = mark(entries, band, shared);
    for (int begin = 0; begin < total; begin += kChunk) {
      find_lines(problem, band, begin, total, shared);
      __syncthreads();  // the lines are there, and the sums of the chunk before have been read
      multiply(problem, shared);
      __syncthreads();
      band.for_each_entry(entries, [&](int64_t e, int r, int word, int bit) {
        const int place = shared.before[word] + __popc(shared.marked[word] & ((1u << bit) - 1)) - begin;
        if (is_inside(place, kChunk)) problem.add(e, shared.sums[r][place]);
      });
    }
    __syncthreads();  // everybody has done with the marks
  }
}

// Part of a matrix, two neighbouring t of a column to a word.
template <typename T>
struct Square {
  Vec<T, 2> pairs[kTurned / 2][kTurned + 1];  // + 1: neighbouring t start in different banks
};

// to[c][t] = the operand's active column c at t, from a matrix that lies by rows.
template <typename T>
__global__ void __launch_bounds__(256) turn(Operand<T> from, int64_t t0, int64_t depth, T* to, int64_t pitch) {
  auto& shared = shared_memory<Square<T>>();
  const int64_t across = (from.active + kTurned - 1) / kTurned;
  const int64_t first_c = blockIdx.x % across * kTurned, first_t = blockIdx.x / across * kTurned;
  const int c = threadIdx.x % kTurned;
  const int64_t column = from.column(first_c + c);
  for (int i = threadIdx.x / kTurned; i < kTurned / 2; i += 256 / kTurned) {
    Vec<T, 2> pair;
    for (int j = 0; j < 2; ++j) {
      const int64_t t = first_t + 2 * i + j;
      pair.at[j] = column >= 0 && t < depth ? from.data[(t0 + t) * from.stride + column] : T(0.f);
    }
    store(&shared.pairs[i][c], pair);
  }
  __syncthreads();
  const int i = threadIdx.x % kWarp;
  if (first_t + 2 * i >= depth) return;  // pitch is even: there is room for the last pair
  for (int line = threadIdx.x / kWarp; line < kTurned && first_c + line < from.active; line += 256 / kWarp) {
    store(reinterpret_cast<Vec<T, 2>*>(to + (first_c + line) * pitch + first_t + 2 * i), shared.pairs[i][line]);
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Whether the columns of a matrix can be copied as they lie: each in order, on a 16-byte boundary.
inline bool lies_by_columns(const Tensor& matrix) {
  return matrix.stride(0) == 1 && matrix.stride(1) % kPiece == 0 && is_aligned(matrix.const_data_ptr());
}

// Tiles that a block takes: so many that about four chunks are full, but no fewer than kBlocks blocks are left.
inline int tiles_together(const Entries& entries) {
  constexpr int64_t kBlocks = 512;  // about four for each multiprocessor of a large GPU
  const int64_t panels = entries.tile_count * parts_down(entries, kPanel);
  const int64_t full = 4 * kChunk * panels / std::max<int64_t>(entries.count, 1);
  const int64_t most = std::min<int64_t>(panels / kBlocks, kWords / words_of(entries.tile_cols));
  return static_cast<int>(std::max<int64_t>(std::min(full, most), 1));
}

constexpr int64_t kWorkspace = 32 << 20;  // bytes of turned copies at a time: they stay in the L2 cache

// `problem` has the operands as they lie. Those that do not lie by columns are copied, so many tokens at a time as the
// workspace holds.
template <typename T>
void run(Call& call, Problem<T> problem, bool rows_lie, bool cols_lie) {
  const Operand<T> rows = problem.rows, cols = problem.cols;
  const int64_t total = problem.depth, copied = (rows_lie ? 0 : rows.active) + (cols_lie ? 0 : cols.active);
  const int64_t bytes = std::max<int64_t>(copied, 1) * static_cast<int64_t>(sizeof(T));
  const int64_t most = std::max<int64_t>(kWorkspace / bytes / kDepth, 1) * kDepth;
  const int64_t slab = copied == 0 ? total : std::min(most, total);
  const int64_t pitch = (slab + kPiece - 1) / kPiece * kPiece;
  T* const row_copy = rows_lie ? nullptr : call.workspace<T>(rows.active * pitch);
  T* const col_copy = cols_lie ? nullptr : call.workspace<T>(cols.active * pitch);
  const auto by_columns = [&](const Operand<T>& from, bool lies, int64_t t0, T* copy) -> Operand<T> {
    if (lies) return {from.data + t0, from.stride, from.width, from.index, from.active};
    const auto squares = [](int64_t size) { return (size + kTurned - 1) / kTurned; };
    call.launch(turn<T>, squares(from.active) * squares(problem.depth), 256, sizeof(Square<T>), from, t0, problem.depth,
                copy, pitch);
    return {copy, pitch, from.active, nullptr, from.active};
  };
  const int together = tiles_together(problem.entries);
  const int64_t groups = (problem.entries.tile_count + together - 1) / together;
  for (int64_t t0 = 0; t0 == 0 || t0 < total; t0 += slab) {
    problem.depth = std::min(slab, total - t0);
    problem.rows = by_columns(rows, rows_lie, t0, row_copy);
    problem.cols = by_columns(cols, cols_lie, t0, col_copy);
    call.launch(masked_grad<T>, groups * parts_down(problem.entries, kPanel), kThreads, sizeof(Memory), problem,
                together);
    problem.accumulate = true;
    if (slab == 0) break;
  }
}

}  // namespace panels
}  // namespace sparseft
