// AdamW on the selected entries of all layers in one launch, and the write into their weights. Every number that
// changes from step to step is read on the device, so that a captured graph stays right.
#include "../rounding.h"
#include "weights.cuh"

namespace sparseft {
namespace {

constexpr int kQuads = 1;  // its streams alone are six 16-byte accesses

struct Hyper {
  double beta1, beta2, eps, weight_decay;
  bool maximize;
  double host_lr;  // used where both pointers are null: lr lies on the CPU
  const float* lr32;
  const double* lr64;
  const float* grad_scale;
  const float* found_inf;
  const int64_t* step;
  uint64_t seed;  // of stochastic rounding

  __device__ double lr() const {
    if (lr32 != nullptr) return *lr32;
    return lr64 != nullptr ? *lr64 : host_lr;
  }
};

// V: the values' dtype. Wide<W> where they are masters, W where they are the weights themselves (a seed was given).
template <typename W, typename V>
struct State {
  V* values;
  const Wide<W>* grad;
  Wide<W>* exp_avg;
  Wide<W>* exp_avg_sq;
  const W* base;        // may be null
  const int32_t* born;  // may be null
};

// Bias corrections of one age; neighbours mostly share it.
template <typename S>
struct Correction {
  int64_t age = INT64_MIN;
  S rate{}, root{};

  __device__ void at(int64_t now, double lr, const Hyper& hyper) {
    if (now == age) return;
    age = now;
    rate = static_cast<S>(lr / (1 - pow(hyper.beta1, static_cast<double>(now))));
    root = static_cast<S>(sqrt(1 - pow(hyper.beta2, static_cast<double>(now))));
  }
};

// What random bits are drawn from; neighbours mostly share their layer's step.
struct Key {
  int64_t step = INT64_MIN;
  uint64_t word{};

  __device__ uint64_t at(int64_t now, const Hyper& hyper) {
    if (now != step) word = random_word(hyper.seed, step = now);
    return word;
  }
};

template <typename W, typename V>
__global__ void __launch_bounds__(kEntryThreads, 2)
    sparse_adamw(Table<Weight<W>> weights, State<W, V> state, Entries entries, Hyper hyper, bool aligned) {
  using S = Wide<W>;
  if (hyper.found_inf != nullptr && *hyper.found_inf != 0) return;
  const double lr = hyper.lr();
  const S decay = static_cast<S>(lr * hyper.weight_decay), eps = static_cast<S>(hyper.eps);
  const S beta2 = static_cast<S>(hyper.beta2);
  const S fresh1 = static_cast<S>(1 - hyper.beta1), fresh2 = static_cast<S>(1 - hyper.beta2);
  S scale = hyper.grad_scale != nullptr ? static_cast<S>(*hyper.grad_scale) : S{1};
  if (hyper.maximize) scale = -scale;

  Located<W> at[kQuads];
  V values[kQuads][kQuad];
  S grad[kQuads][kQuad], exp_avg[kQuads][kQuad], exp_avg_sq[kQuads][kQuad];
  W base[kQuads][kQuad] = {};
  int32_t born[kQuads][kQuad] = {};
  locate_quads(at, entries, weights, aligned);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {  // all reads before the first write: they are under way together
    at[q].quad.read(values[q], state.values);
    at[q].quad.read(grad[q], state.grad);
    at[q].quad.read(exp_avg[q], state.exp_avg);
    at[q].quad.read(exp_avg_sq[q], state.exp_avg_sq);
    if (state.base != nullptr) at[q].quad.read(base[q], state.base);
    if (state.born != nullptr) at[q].quad.read(born[q], state.born);
  }
  Correction<S> correction;
  Key key;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (at[q].weight[i] == nullptr) continue;
      S w = static_cast<S>(values[q][i]), &m = exp_avg[q][i], &v = exp_avg_sq[q][i];
      const int64_t step = hyper.step[at[q].layer[i]];
      correction.at(step - born[q][i], lr, hyper);
      const S g = grad[q][i] * scale;
      const S target = state.base != nullptr ? static_cast<S>(base[q][i]) : S{0};
      w -= decay * (w - target);
      m = fresh1 < S{0.5} ? m + fresh1 * (g - m) : g - (g - m) * (S{1} - fresh1);  // torch.lerp: each exact at its end
      v = v * beta2 + fresh2 * g * g;
      w -= correction.rate * m / (sqrt(v) / correction.root + eps);
      if constexpr (std::is_same_v<V, S>) {
        values[q][i] = w;
      } else {
        round_stochastically(w, random_bits(key.at(step, hyper), at[q].quad.entry + i), values[q][i]);
      }
      *at[q].weight[i] = static_cast<W>(values[q][i]);
    }
    at[q].quad.write(state.values, values[q]);
    at[q].quad.write(state.exp_avg, exp_avg[q]);
    at[q].quad.write(state.exp_avg_sq, exp_avg_sq[q]);
  }
}

void sparse_adamw_cuda(std::vector<Tensor> weights, Tensor values, const Tensor& grad, Tensor exp_avg,
                       Tensor exp_avg_sq, std::optional<Tensor> base, const Tensor& step, std::optional<Tensor> born,
                       const Tensor& rows, const Tensor& cols, const Tensor& tiles, const Tensor& local,
                       std::vector<int64_t> tile, const Tensor& lr, double beta1, double beta2, double eps,
                       double weight_decay, bool maximize, std::optional<Tensor> grad_scale,
                       std::optional<Tensor> found_inf, std::optional<int64_t> seed) {
  check_sparse_adamw(weights, values, grad, exp_avg, exp_avg_sq, base, step, born, rows, cols, tiles, local, tile, lr,
                     grad_scale, found_inf, seed);
  Call call(weights[0]);
  const Entries entries = make_entries(call, rows, cols, tiles, local, tile);
  Hyper hyper{beta1, beta2, eps, weight_decay, maximize};
  const bool narrow = lr.scalar_type() == ScalarType::Float;
  if (lr.device() != weights[0].device()) {  // the host reads it
    hyper.host_lr =
        narrow ? *static_cast<const float*>(lr.const_data_ptr()) : *static_cast<const double*>(lr.const_data_ptr());
  } else if (narrow) {
    hyper.lr32 = call.input<float>(lr);
  } else {
    hyper.lr64 = call.input<double>(lr);
  }
  hyper.grad_scale = call.input<float>(grad_scale);
  hyper.found_inf = call.input<float>(found_inf);
  hyper.step = call.input<int64_t>(step);
  hyper.seed = static_cast<uint64_t>(seed.value_or(0));
  visit_float(weights[0].scalar_type(), [&](auto tag) {
    using W = typename decltype(tag)::type;
    using S = Wide<W>;
    const auto run = [&](auto* numbers) {
      using V = std::remove_pointer_t<decltype(numbers)>;
      const State<W, V> state{call.output<V>(values),     call.input<S>(grad), call.output<S>(exp_avg),
                              call.output<S>(exp_avg_sq), call.input<W>(base), call.input<int32_t>(born)};
      bool aligned = is_aligned(entries.local);
      for (const void* pointer : std::initializer_list<const void*>{state.values, state.grad, state.exp_avg,
                                                                    state.exp_avg_sq, state.base, state.born}) {
        aligned = aligned && is_aligned(pointer);
      }
      call.launch(sparse_adamw<W, V>, entry_blocks(entries, kQuads), kEntryThreads, 0, make_weights<W>(call, weights),
                  state, entries, hyper, aligned);
    };
    if (seed) {
      if constexpr (sizeof(W) == 2) run(static_cast<W*>(nullptr));
    } else {
      run(static_cast<S*>(nullptr));
    }
  });
}

}  // namespace

SPARSEFT_CUDA_OPS(m) {
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_cuda));
}

}  // namespace sparseft
