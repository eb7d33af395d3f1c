// Write values into the selected weights of all layers in one launch. Entries are unique: no atomics, deterministic.
#include "weights.cuh"

namespace sparseft {
namespace {

constexpr int kQuads = 2;  // eight weight accesses of a thread are in flight

template <typename W, typename V>
__device__ W combine(W weight, V value, WriteMode mode, double alpha) {
  using S = Wide<W>;
  if (mode == WriteMode::add)
    return static_cast<W>(static_cast<S>(weight) + static_cast<S>(alpha) * static_cast<S>(value));
  if constexpr (std::is_same_v<W, V>) {
    return value;  // bit for bit
  } else {
    return static_cast<W>(value);
  }
}

template <typename W, typename V>
__global__ void __launch_bounds__(kEntryThreads, 2)
    scatter_delta(Table<Weight<W>> weights, V* values, Entries entries, WriteMode mode, double alpha, bool aligned) {
  Located<W> at[kQuads];
  V value[kQuads][kQuad];
  W before[kQuads][kQuad];
  locate_quads(at, entries, weights, aligned);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {  // all reads before the first write: they are under way together
    at[q].quad.read(value[q], values);
    for (int i = 0; i < kQuad; ++i) {
      if (at[q].weight[i] != nullptr && mode != WriteMode::copy) before[q][i] = *at[q].weight[i];
    }
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    for (int i = 0; i < kQuad; ++i) {
      if (at[q].weight[i] != nullptr) *at[q].weight[i] = combine(before[q][i], value[q][i], mode, alpha);
    }
    if constexpr (std::is_same_v<W, V>) {
      if (mode == WriteMode::swap) at[q].quad.write(values, before[q]);
    }
  }
}

void scatter_delta_cuda(std::vector<Tensor> weights, Tensor values, const Tensor& rows, const Tensor& cols,
                        const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile, std::string write_mode,
                        double alpha) {
  const WriteMode mode = parse_write_mode(write_mode);
  check_scatter_delta(weights, values, rows, cols, tiles, local, tile, mode);
  Call call(weights[0]);
  const Entries entries = make_entries(call, rows, cols, tiles, local, tile);
  visit_float(weights[0].scalar_type(), [&](auto tag) {
    using W = typename decltype(tag)::type;
    const auto table = make_weights<W>(call, weights);
    const auto run = [&](auto value_tag) {
      using V = typename decltype(value_tag)::type;
      V* data = call.output<V>(values);
      const bool aligned = is_aligned(data) && is_aligned(entries.local);
      call.launch(scatter_delta<W, V>, entry_blocks(entries, kQuads), kEntryThreads, 0, table, data, entries, mode,
                  alpha, aligned);
    };
    if (values.scalar_type() == weights[0].scalar_type()) return run(Tag<W>{});
    run(Tag<float>{});
  });
}

}  // namespace

SPARSEFT_CUDA_OPS(m) {
  m.impl("scatter_delta_", TORCH_BOX(&scatter_delta_cuda));
}

}  // namespace sparseft
