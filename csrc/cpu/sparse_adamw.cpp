// sparse_adamw_: one AdamW step (Loshchilov & Hutter, 2019) over the selected entries of all layers, and the rounded
// write into their weights.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>

#include "../rounding.h"
#include "narrow.h"
#include "pieces.h"

namespace sparseft {
namespace {

// All scalars in the precision W of the optimizer state.
template <typename W>
struct Hyper {
  W shrink;  // lr * weight_decay
  W keep1;   // beta1
  W mix1;    // 1 - beta1
  W keep2;   // beta2
  W mix2;    // 1 - beta2
  W eps;
  W grad_scale;  // negative to maximize
};

// The bias corrections of one entry: its learning rate lr / (1 - beta1^age), and sqrt(1 - beta2^age).
template <typename W>
struct Correction {
  W rate;
  W root;
};

template <typename W>
Correction<W> correction(double lr, double beta1, double beta2, int64_t age) {
  const double power = static_cast<double>(age);
  return {static_cast<W>(lr / (1 - std::pow(beta1, power))), static_cast<W>(std::sqrt(1 - std::pow(beta2, power)))};
}

// Corrections by age. Ages repeat: the powers are kept in a small direct-mapped table.
template <typename W>
class Corrections {
 public:
  Corrections(double lr, double beta1, double beta2) : lr_(lr), beta1_(beta1), beta2_(beta2) { ages_.fill(-1); }

  const Correction<W>& operator()(int64_t age) {
    const size_t slot = static_cast<uint64_t>(age) % kSlots;
    if (ages_[slot] != age) {
      ages_[slot] = age;
      slots_[slot] = correction<W>(lr_, beta1_, beta2_, age);
    }
    return slots_[slot];
  }

 private:
  static constexpr size_t kSlots = 64;
  double lr_, beta1_, beta2_;
  std::array<int64_t, kSlots> ages_;
  std::array<Correction<W>, kSlots> slots_;
};

// The same number for every entry.
template <typename W>
struct Same {
  SPARSEFT_INLINE W operator[](int64_t) const { return number; }
  W number;
};

// The state of neighbouring entries. Target and Rates: Same<W>, or const W* where entries differ.
template <typename W, typename Target, typename Rates>
struct Span {
  int64_t count;
  W* values;
  const W* grad;
  W* exp_avg;
  W* exp_avg_sq;
  Target target;  // what weight decay pulls towards
  Rates rate;
  Rates root;
};

template <typename W, typename Target, typename Rates>
SPARSEFT_CLONES void update(Span<W, Target, Rates> s, Hyper<W> h) {  // by value: no store can change them
  const bool small = h.mix1 < W(0.5);
#pragma GCC ivdep
  for (int64_t i = 0; i < s.count; ++i) {
    const W g = s.grad[i] * h.grad_scale;
    W w = s.values[i];
    w -= h.shrink * (w - s.target[i]);
    W m = s.exp_avg[i];
    m = small ? m + h.mix1 * (g - m) : g - h.keep1 * (g - m);  // as torch.lerp
    const W v = s.exp_avg_sq[i] * h.keep2 + h.mix2 * g * g;
    w -= s.rate[i] * m / (std::sqrt(v) / s.root[i] + h.eps);
    s.values[i] = w;
    s.exp_avg[i] = m;
    s.exp_avg_sq[i] = v;
  }
}

// Rounds the fp32 values of neighbouring entries, the first of which is number `first`; `key` is the layer's of this
// step.
template <typename T>
SPARSEFT_CLONES void round_span(const float* from, int64_t count, uint64_t key, int64_t first, T* to) {
  for (int64_t i = 0; i < count; ++i) round_stochastically(from[i], random_bits(key, first + i), to[i]);
}

// To the nearest.
template <typename T, typename W>
SPARSEFT_CLONES void round_span(const W* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      narrow(from[i], to[i]);
    } else {
      to[i] = static_cast<T>(from[i]);
    }
  }
}

// V: the values' dtype. Wide<T> where they are masters, T where they are the weights themselves (`seed` is given).
template <typename T, typename V>
struct State {
  V* values;
  const Wide<T>* grad;
  Wide<T>* exp_avg;
  Wide<T>* exp_avg_sq;
  const T* base;        // or nullptr: decay towards zero
  const int64_t* step;  // [layers]
  const int32_t* born;  // or nullptr: every entry is as old as its layer
  uint64_t seed;        // of stochastic rounding
};

template <typename T, typename V>
void adamw(const std::vector<T*>& weights, const std::vector<Shape>& shapes, const State<T, V>& state,
           const Worklist& work, double lr, double beta1, double beta2, const Hyper<Wide<T>>& hyper) {
  using W = Wide<T>;
  std::vector<Correction<W>> of_layer;
  for (size_t layer = 0; layer < weights.size(); ++layer)
    of_layer.push_back(correction<W>(lr, beta1, beta2, state.step[layer]));
  for_each_piece(work, weights, shapes, 2048, [&](const Piece<T>& piece) {
    const int64_t start = piece.first, count = piece.count, layer = piece.layer;
    const auto towards = [&](W* values, auto target) {
      const auto at_rates = [&](auto rate, auto root) {
        update<W>(Span<W, decltype(target), decltype(rate)>{count, values, state.grad + start, state.exp_avg + start,
                                                            state.exp_avg_sq + start, target, rate, root},
                  hyper);
      };
      if (!state.born) return at_rates(Same<W>{of_layer[layer].rate}, Same<W>{of_layer[layer].root});
      Corrections<W> of_age(lr, beta1, beta2);
      W rate[kPiece], root[kPiece];
      for (int64_t i = 0; i < count; ++i) {
        const Correction<W>& own = of_age(state.step[layer] - state.born[start + i]);
        rate[i] = own.rate;
        root[i] = own.root;
      }
      at_rates(static_cast<const W*>(rate), static_cast<const W*>(root));
    };
    const auto updated = [&](W* values) {
      if (!state.base) return towards(values, Same<W>{0});
      if constexpr (std::is_same_v<T, W>) {
        towards(values, state.base + start);
      } else {
        W base[kPiece];
        std::copy_n(state.base + start, count, base);
        towards(values, static_cast<const W*>(base));
      }
    };
    V* values = state.values + start;
    if constexpr (std::is_same_v<V, W>) {
      updated(values);
    } else {
      W wide[kPiece];
      std::copy_n(values, count, wide);
      updated(wide);
      round_span(wide, count, random_word(state.seed, state.step[layer]), start, values);
    }
    const auto write = [&](const T* rounded) {
      for (int64_t i = 0; i < count; ++i) *piece.at[i] = rounded[i];
    };
    if constexpr (std::is_same_v<V, T>) {
      write(values);
    } else {
      T rounded[kPiece];
      round_span(values, count, rounded);
      write(rounded);
    }
  });
}

double number(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *scalar.const_data_ptr<double>()
                                                    : *scalar.const_data_ptr<float>();
}

void sparse_adamw(std::vector<Tensor> weights, Tensor values, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq,
                  std::optional<Tensor> base, const Tensor& step, std::optional<Tensor> born, const Tensor& rows,
                  const Tensor& cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                  const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                  std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<int64_t> seed) {
  check_sparse_adamw(weights, values, grad, exp_avg, exp_avg_sq, base, step, born, rows, cols, tiles, local, tile, lr,
                     grad_scale, found_inf, seed);
  const Worklist work(Order(rows, 0), Order(cols, 0), tiles, local, tile);
  const std::vector<Shape> shapes = shapes_of(weights);
  work.check_bounds("sparse_adamw_", shapes);
  if (found_inf && number(*found_inf) != 0) return;
  const double rate = number(lr), sign = maximize ? -1 : 1;
  visit_float(weights[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    const Hyper<W> hyper{static_cast<W>(rate * weight_decay),
                         static_cast<W>(beta1),
                         static_cast<W>(1 - beta1),
                         static_cast<W>(beta2),
                         static_cast<W>(1 - beta2),
                         static_cast<W>(eps),
                         static_cast<W>(sign * (grad_scale ? number(*grad_scale) : 1))};
    const auto run = [&](auto* numbers) {
      using V = std::remove_pointer_t<decltype(numbers)>;
      const State<T, V> state{numbers,
                              grad.const_data_ptr<W>(),
                              exp_avg.mutable_data_ptr<W>(),
                              exp_avg_sq.mutable_data_ptr<W>(),
                              base ? base->const_data_ptr<T>() : nullptr,
                              step.const_data_ptr<int64_t>(),
                              born ? born->const_data_ptr<int32_t>() : nullptr,
                              static_cast<uint64_t>(seed.value_or(0))};
      adamw(data_of<T>(weights), shapes, state, work, rate, beta1, beta2, hyper);
    };
    if (seed) {
      if constexpr (sizeof(T) == 2) run(values.mutable_data_ptr<T>());
    } else {
      run(values.mutable_data_ptr<W>());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw));
}

}  // namespace sparseft
