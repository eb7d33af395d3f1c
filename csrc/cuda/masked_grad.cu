// The weight gradient at the selected entries: out[s] (+)= sum over t of grad_out[t, row(s)] * input[t, col(s)].
//
// One block computes one 64 x 64 part of a tile of the worklist over all t, in a fixed order, and hands out the
// entries' sums from shared memory: every output has one writer, so the result is the same on every run.
#include "common.cuh"

namespace sparseft {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 64;   // rows and columns of a block's part
constexpr int kDepth = 16;  // t per stage
constexpr int kOwn = 4;     // a thread computes kOwn x kOwn sums

// grad_out or input: element (t, c) of its active columns is data[t * stride + index[c]].
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
  int64_t width;         // columns of the matrix
  const int32_t* index;  // null: compact, column c is c itself
  int64_t active;        // how many c there are

  // -1 where a part reaches beyond the active columns, or into another layer's.
  __device__ int64_t column(int64_t c) const {
    if (c >= active) return -1;
    const int64_t at = index != nullptr ? index[c] : c;
    return at < width ? at : -1;
  }
};

template <typename T>
struct Problem {
  Operand<T> rows, cols;  // grad_out, input
  int64_t depth;          // T
  Entries entries;
  Wide<T>* out;
  bool accumulate;
};

// The part of a tile that a block computes.
struct Part {
  Tile tile;
  int row, col;  // its first row and column inside the tile

  __device__ Part(const Entries& entries, int64_t block) {
    const int across = (entries.tile_cols + kSide - 1) / kSide;
    const int parts = across * ((entries.tile_rows + kSide - 1) / kSide);
    const int part = static_cast<int>(block % parts);
    tile = entries.tiles[block / parts];
    row = part / across * kSide;
    col = part % across * kSide;
  }

  // Row and column inside the part of an entry of the tile; false if it lies elsewhere in the tile.
  __device__ bool find(const Entries& entries, int64_t entry, int& r, int& c) const {
    const unsigned position = entries.local[entry];
    r = entries.row(position) - row;
    c = entries.col(position) - col;
    return r >= 0 && r < kSide && c >= 0 && c < kSide;
  }
};

inline int64_t part_count(const Entries& entries) {
  const int64_t across = (entries.tile_cols + kSide - 1) / kSide, down = (entries.tile_rows + kSide - 1) / kSide;
  return entries.tile_count * across * down;
}

// Whether the part has any entry at all (block-wide).
__device__ bool has_entries(const Entries& entries, const Part& part) {
  int r, c;
  bool mine = false;
  for (int64_t e = part.tile.entry0 + threadIdx.x; e < part.tile.entry1; e += kThreads) {
    mine = mine || part.find(entries, e, r, c);
  }
  return __syncthreads_or(mine);
}

// Each entry of the part gets its sum.
template <typename T, typename S, int kPitch>
__device__ void hand_out(const Problem<T>& problem, const Part& part, const S (&sums)[kSide][kPitch]) {
  int r, c;
  for (int64_t e = part.tile.entry0 + threadIdx.x; e < part.tile.entry1; e += kThreads) {
    if (!part.find(problem.entries, e, r, c)) continue;
    problem.out[e] = problem.accumulate ? problem.out[e] + sums[r][c] : sums[r][c];
  }
}

template <typename S>
struct Memory {
  S rows[kDepth][kSide];
  S cols[kDepth][kSide];
  S sums[kSide][kSide + 1];  // + 1: neighbouring rows start in different banks
};

template <typename T>
__device__ void read_stage(const Operand<T>& operand, int64_t column, int64_t t0, int64_t depth,
                           Wide<T> (&stage)[kDepth][kSide]) {
  const int c = threadIdx.x % kSide;
  for (int t = threadIdx.x / kSide; t < kDepth; t += kThreads / kSide) {
    const bool inside = column >= 0 && t0 + t < depth;
    stage[t][c] = inside ? static_cast<Wide<T>>(operand.data[(t0 + t) * operand.stride + column]) : Wide<T>{0};
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) masked_grad(Problem<T> problem) {
  using S = Wide<T>;
  auto& shared = shared_memory<Memory<S>>();
  const Part part(problem.entries, blockIdx.x);
  if (!has_entries(problem.entries, part)) return;
  const int64_t row = problem.rows.column(part.tile.row0 + part.row + threadIdx.x % kSide);
  const int64_t col = problem.cols.column(part.tile.col0 + part.col + threadIdx.x % kSide);
  const int r0 = threadIdx.x / (kSide / kOwn) * kOwn, c0 = threadIdx.x % (kSide / kOwn) * kOwn;
  S sums[kOwn][kOwn] = {};
  for (int64_t t0 = 0; t0 < problem.depth; t0 += kDepth) {
    read_stage(problem.rows, row, t0, problem.depth, shared.rows);
    read_stage(problem.cols, col, t0, problem.depth, shared.cols);
    __syncthreads();
    for (int t = 0; t < kDepth; ++t) {
      S a[kOwn], b[kOwn];
      for (int i = 0; i < kOwn; ++i) a[i] = shared.rows[t][r0 + i];
      for (int i = 0; i < kOwn; ++i) b[i] = shared.cols[t][c0 + i];
      for (int i = 0; i < kOwn; ++i) {
        for (int j = 0; j < kOwn; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kOwn; ++i) {
    for (int j = 0; j < kOwn; ++j) shared.sums[r0 + i][c0 + j] = sums[i][j];
  }
  __syncthreads();
  hand_out(problem, part, shared.sums);
}

template <typename T>
Operand<T> make_operand(const Call& call, const Tensor& matrix, const std::optional<Tensor>& index) {
  return {call.input<T>(matrix), matrix.stride(0), matrix.size(1), call.input<int32_t>(index),
          index ? index->numel() : matrix.size(1)};
}

void masked_grad_cuda(Tensor out, const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows,
                      std::optional<Tensor> cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                      bool accumulate) {
  check_masked_grad(out, grad_out, input, rows, cols, tiles, local, tile);
  // each row of an operand is read as neighbouring elements
  const auto by_rows = [](const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); };
  const Tensor left = by_rows(grad_out), right = by_rows(input);
  Call call(out);
  const Entries entries = make_entries(call, rows, cols, tiles, local, tile);
  visit_float(grad_out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Problem<T> problem{make_operand<T>(call, left, rows), make_operand<T>(call, right, cols), left.size(0),
                             entries, call.output<Wide<T>>(out, !accumulate), accumulate};
    call.launch(masked_grad<T>, part_count(entries), kThreads, sizeof(Memory<Wide<T>>), problem);
  });
}

}  // namespace

SPARSEFT_CUDA_OPS(m) { m.impl("masked_grad_", TORCH_BOX(&masked_grad_cuda)); }

}  // namespace sparseft
