// The weight gradient at the selected entries: out[s] (+)= sum over t of grad_out[t, row(s)] * input[t, col(s)].
//
// A block computes one square part of a tile of the worklist over all t, in a fixed order, and the entries pick
// their sums from shared memory: every output has one writer, so the result is the same on every run. bf16 and fp16
// multiply on tensor cores, fp32 and fp64 on the ordinary ones. Where tiles hold few entries: panels.cuh.
#include "panels.cuh"

#include <cstdlib>
#include <string_view>

namespace sparseft {
namespace {

// ---- fp32, fp64 --------------------------------------------------------------------------------------------------

namespace plain {

constexpr int kThreads = 256;
constexpr int kSide = 64;
constexpr int kDepth = 16;  // t per stage
constexpr int kOwn = 4;     // a thread computes kOwn x kOwn sums
constexpr int kFew = 32;

template <typename T>
struct Memory {
  T rows[kDepth][kSide];
  T cols[kDepth][kSide];
  T sums[kSide][kSide + 1];  // + 1: neighbouring rows start in different banks
};

template <typename T>
__device__ void read_stage(const Operand<T>& operand, int64_t column, int64_t t0, int64_t depth,
                           T (&stage)[kDepth][kSide]) {
  const int c = threadIdx.x % kSide;
  for (int t = threadIdx.x / kSide; t < kDepth; t += kThreads / kSide) {
    const bool inside = column >= 0 && t0 + t < depth;
    stage[t][c] = inside ? operand.data[(t0 + t) * operand.stride + column] : T{0};
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) masked_grad(Problem<T> problem) {
  auto& shared = shared_memory<Memory<T>>();
  const Part<kSide> part(problem.entries, blockIdx.x);
  if (part.entry1 - part.entry0 <= problem.few) return sample(problem, part);
  if (part.is_empty(problem.entries)) return;

  const int64_t row = problem.rows.column(part.row0 + threadIdx.x % kSide);
  const int64_t col = problem.cols.column(part.col0 + threadIdx.x % kSide);
  const int r0 = threadIdx.x / (kSide / kOwn) * kOwn, c0 = threadIdx.x % (kSide / kOwn) * kOwn;
  T sums[kOwn][kOwn] = {};
  for (int64_t t0 = 0; t0 < problem.depth; t0 += kDepth) {
    read_stage(problem.rows, row, t0, problem.depth, shared.rows);
    read_stage(problem.cols, col, t0, problem.depth, shared.cols);
    __syncthreads();
    for (int t = 0; t < kDepth; ++t) {
      T a[kOwn], b[kOwn];
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
  hand_out(problem, part, 0, shared.sums);
}

}  // namespace plain

// ---- bf16, fp16: tensor cores ------------------------------------------------------------------------------------

namespace tensor_core {

constexpr int kDepth = 32;  // t per stage
constexpr int kStages = 3;  // two are being copied while one is multiplied
constexpr int kWarpRows = 32;
constexpr int kChunk = 8;                          // neighbouring columns that move at once: 16 bytes
constexpr int kSlab = 64;                          // rows handed out at a time
constexpr int kFewGathered = 32, kFewCompact = 4;  // below this, gathering columns moves less than reading the part

template <int kSide>
constexpr int kThreads = kSide / kWarpRows * 2 * kWarp;  // two warps across

// A stage of one operand: [t][column]. Chunks are exchanged inside a row so that the eight rows which ldmatrix reads
// together lie in different banks.
template <int kSide>
struct Stage {
  Vec<uint16_t, kChunk> chunks[kDepth][kSide / kChunk];

  __device__ Vec<uint16_t, kChunk>* at(int t, int column) { return &chunks[t][(column / kChunk) ^ (t % 8)]; }
};

template <int kSide>
union Memory {
  struct {
    Stage<kSide> rows, cols;
  } stages[kStages];
  float sums[kSlab][kSide + 1];
};

// Whether chunks of the part can be copied as they lie: columns in order and everything on 16-byte boundaries.
template <typename T>
__device__ bool is_copyable(const Operand<T>& operand, int64_t first) {
  return operand.index == nullptr && operand.stride % kChunk == 0 && first % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

// Brings [t0, t0 + kDepth) of the part's columns into a stage; zeros beyond the edges.
template <typename T, int kSide>
__device__ void fetch(const Operand<T>& operand, int64_t first, int64_t t0, int64_t depth, Stage<kSide>& stage) {
  if (is_copyable(operand, first)) {
    for (int i = threadIdx.x; i < kDepth * (kSide / kChunk); i += kThreads<kSide>) {
      const int t = i / (kSide / kChunk), c = i % (kSide / kChunk) * kChunk;
      const int64_t left = t0 + t < depth ? min(operand.active, operand.width) - first - c : 0;
      const int count = left < 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
      const T* from = count > 0 ? operand.data + (t0 + t) * operand.stride + first + c : operand.data;
      copy_async(stage.at(t, c), from, count * static_cast<int>(sizeof(T)));
    }
  } else {
#pragma unroll 1  // the uncommon way must not cost the other one registers
    for (int i = threadIdx.x; i < kDepth * (kSide / kChunk); i += kThreads<kSide>) {
      const int t = i / (kSide / kChunk), c = i % (kSide / kChunk) * kChunk;
      const T* line = operand.data + (t0 + t) * operand.stride;
      Vec<T, kChunk> chunk;
      for (int j = 0; j < kChunk; ++j) {
        const int64_t column = t0 + t < depth ? operand.column(first + c + j) : -1;
        chunk.at[j] = column >= 0 ? line[column] : T(0.f);
      }
      store(reinterpret_cast<Vec<T, kChunk>*>(stage.at(t, c)), chunk);
    }
  }
}

template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads<kSide>, 1) masked_grad(Problem<T> problem) {
  constexpr int kWarpCols = kSide / 2;
  constexpr int kDown = kWarpRows / 16, kAcross = kWarpCols / 8;  // 16 x 8 products of a warp
  auto& shared = shared_memory<Memory<kSide>>();
  const Part<kSide> part(problem.entries, blockIdx.x);
  if (part.entry1 - part.entry0 <= problem.few) return sample(problem, part);
  if (part.is_empty(problem.entries)) return;

  const auto fetch_stage = [&](int64_t number) {
    if (number * kDepth < problem.depth) {
      auto& stage = shared.stages[number % kStages];
      fetch(problem.rows, part.row0, number * kDepth, problem.depth, stage.rows);
      fetch(problem.cols, part.col0, number * kDepth, problem.depth, stage.cols);
    }
    commit_copies();  // an empty group past the end keeps the count right
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch_stage(i);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int r0 = warp / 2 * kWarpRows, c0 = warp % 2 * kWarpCols;
  float sums[kDown][kAcross][4] = {};
  for (int64_t i = 0; i * kDepth < problem.depth; ++i) {
    wait_for_copies<kStages - 2>();  // groups past the end are empty: the last of these waits for all that is left
    __syncthreads();  // stage i is there for all, and all have done with stage i - 1, whose place is filled next
    fetch_stage(i + kStages - 1);
    auto& stage = shared.stages[i % kStages];
    for (int t = 0; t < kDepth; t += 16) {
      // both operands lie with t across the rows of an 8 x 8 matrix: read transposed
      uint32_t a[kDown][4], b[kAcross][2];
      for (int m = 0; m < kDown; ++m) {
        load_matrices(a[m], stage.rows.at(t + lane % 8 + lane / 16 * 8, r0 + m * 16 + lane / 8 % 2 * 8));
      }
      for (int n = 0; n < kAcross; n += 2) {
        uint32_t pair[4];
        load_matrices(pair, stage.cols.at(t + lane % 16, c0 + n * 8 + lane / 16 * 8));
        b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
      }
      for (int m = 0; m < kDown; ++m) {
        for (int n = 0; n < kAcross; ++n) multiply_add<T>(sums[m][n], a[m], b[n]);
      }
    }
  }

  for (int first = 0; first < kSide; first += kSlab) {
    __syncthreads();  // the memory of the stages, or of the slab before, is free
    if (r0 >= first && r0 < first + kSlab) {
      for (int m = 0; m < kDown; ++m) {
        for (int n = 0; n < kAcross; ++n) {
          for (int j = 0; j < 4; ++j) {
            const int r = r0 - first + m * 16 + lane / 4 + j / 2 * 8, c = c0 + n * 8 + lane % 4 * 2 + j % 2;
            shared.sums[r][c] = sums[m][n][j];
          }
        }
      }
    }
    __syncthreads();
    hand_out(problem, part, first, shared.sums);
  }
}

// to[t][c] = the operand's active column c at t, rows padded to whole chunks.
template <typename T>
__global__ void __launch_bounds__(256)
    compact_columns(Operand<T> from, int64_t t0, int64_t depth, T* to, int64_t pitch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= depth * pitch) return;
  const int64_t column = from.column(i % pitch);
  to[i] = column >= 0 ? from.data[(t0 + i / pitch) * from.stride + column] : T(0.f);
}

constexpr int64_t kWorkspace = 64 << 20;  // bytes of compact copies at a time

template <typename T, int kSide>
void run(Call& call, Problem<T> problem) {
  const int64_t parts = part_count(problem.entries, kSide);
  const auto multiply = [&] {
    call.launch(masked_grad<T, kSide>, parts, kThreads<kSide>, sizeof(Memory<kSide>), problem);
  };
  // Compact copies make every read of a part a 16-byte copy. They pay where each column serves several parts.
  const int64_t columns = problem.rows.active + problem.cols.active;
  const bool gathered = problem.rows.index != nullptr || problem.cols.index != nullptr;
  if (!gathered || parts * kSide < 2 * columns) {
    problem.few = gathered ? kFewGathered : kFewCompact;
    return multiply();
  }
  problem.few = kFewCompact;
  const Operand<T> rows = problem.rows, cols = problem.cols;
  const auto pitch = [](const Operand<T>& operand) { return (operand.active + kChunk - 1) / kChunk * kChunk; };
  const int64_t bytes = (pitch(rows) + pitch(cols)) * static_cast<int64_t>(sizeof(T));
  const int64_t total = problem.depth, most = std::max<int64_t>(kWorkspace / bytes / kDepth, 16) * kDepth;
  const int64_t slab = std::min(most, total);
  T* const row_copy = call.workspace<T>(slab * pitch(rows));
  T* const col_copy = call.workspace<T>(slab * pitch(cols));
  const auto copy = [&](const Operand<T>& from, int64_t t0, T* to) -> Operand<T> {
    call.launch(compact_columns<T>, (problem.depth * pitch(from) + 255) / 256, 256, 0, from, t0, problem.depth, to,
                pitch(from));
    return {to, pitch(from), pitch(from), nullptr, from.active};
  };
  for (int64_t t0 = 0; t0 == 0 || t0 < total; t0 += slab) {
    problem.depth = std::min(slab, total - t0);
    problem.rows = copy(rows, t0, row_copy);
    problem.cols = copy(cols, t0, col_copy);
    multiply();
    problem.accumulate = true;
    if (slab == 0) break;
  }
}

}  // namespace tensor_core

// ---- host --------------------------------------------------------------------------------------------------------

// By rows or by columns: `stride` is the larger step, the other one is 1.
template <typename T>
Operand<T> make_operand(const Call& call, const Tensor& matrix, const std::optional<Tensor>& index, bool by_columns) {
  return {call.input<T>(matrix), matrix.stride(by_columns ? 1 : 0), matrix.size(1), call.input<int32_t>(index),
          index ? index->numel() : matrix.size(1)};
}

// Whether panels are the better way. Both ways are bound by the operands' elements that they load for each t: a part of
// a tile 2 * side of them; an entry, taken to need a column of its own, 1 and that column's share of the panel's rows;
// a column that is copied first, 2 more. Panels where these are fewer than half as many.
//
// A worklist may be a part of what `local` holds; then there are fewer entries than it looks, and tiles more often.
bool prefers_panels(const Entries& entries, int side, int64_t copied) {
  if (panels::words_of(entries.tile_cols) > panels::kWords) return false;
  const char* set = std::getenv("SPARSEFT_MASKED_GRAD");
  const std::string_view asked = set == nullptr ? "" : set;
  STD_TORCH_CHECK(asked.empty() || asked == "tiles" || asked == "panels",
                  "masked_grad_: SPARSEFT_MASKED_GRAD must be tiles or panels, got ", set);
  if (!asked.empty()) return asked == "panels";
  if (entries.tile_rows < panels::kPanel) return false;
  const double each = 1 + static_cast<double>(panels::kPanel) / panels::kChunk;
  const double elements = each * static_cast<double>(entries.count) + 2 * static_cast<double>(copied);
  return 2 * elements < 2 * side * static_cast<double>(part_count(entries, side));
}

void masked_grad_cuda(Tensor out, const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows,
                      std::optional<Tensor> cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                      bool accumulate) {
  check_masked_grad(out, grad_out, input, rows, cols, tiles, local, tile);
  Call call(out);
  const Entries entries = make_entries(call, rows, cols, tiles, local, tile);
  const auto by_rows = [](const Tensor& matrix) {  // the kernels step through a row one element at a time
    return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
  };
  const bool large = entries.tile_rows >= 128 && entries.tile_cols >= 128;
  const bool left_lies = panels::lies_by_columns(grad_out), right_lies = panels::lies_by_columns(input);
  const int64_t copied = (left_lies ? 0 : grad_out.size(1)) + (right_lies ? 0 : input.size(1));
  const bool by_panels = grad_out.element_size() == 2 && prefers_panels(entries, large ? 128 : 64, copied);
  const bool left_by_columns = by_panels && left_lies, right_by_columns = by_panels && right_lies;
  const Tensor left = left_by_columns ? grad_out : by_rows(grad_out);  // alive until all is launched
  const Tensor right = right_by_columns ? input : by_rows(input);
  visit_float(grad_out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Problem<T> problem{make_operand<T>(call, left, rows, left_by_columns),
                             make_operand<T>(call, right, cols, right_by_columns),
                             left.size(0),
                             entries,
                             plain::kFew,
                             call.output<Wide<T>>(out),
                             accumulate};
    if constexpr (sizeof(T) > 2) {
      call.launch(plain::masked_grad<T>, part_count(entries, plain::kSide), plain::kThreads, sizeof(plain::Memory<T>),
                  problem);
    } else if (by_panels) {
      panels::run(call, problem, left_by_columns, right_by_columns);
    } else if (large) {
      tensor_core::run<T, 128>(call, problem);
    } else {
      tensor_core::run<T, 64>(call, problem);
    }
  });
}

}  // namespace

SPARSEFT_CUDA_OPS(m) {
  m.impl("masked_grad_", TORCH_BOX(&masked_grad_cuda));
}

}  // namespace sparseft
