// scatter_delta_: write k values into the selected entries of one or several weights.
#include <torch/csrc/stable/library.h>

#include "pieces.h"

namespace sparseft {
namespace {

// T: the weights' dtype. V: the values' (fp32 or T).
template <typename T, typename V>
void write(WriteMode mode, Wide<T> alpha, T& weight, V& value) {
  using W = Wide<T>;
  if (mode == WriteMode::add) {
    weight = static_cast<T>(static_cast<W>(weight) + alpha * static_cast<W>(value));
  } else if (mode == WriteMode::copy) {
    weight = static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, V>) {
    std::swap(weight, value);
  }
}

template <typename T, typename V>
void scatter(const std::vector<T*>& weights, const std::vector<Shape>& shapes, V* values, const Worklist& work,
             WriteMode mode, double alpha) {
  for_each_piece(work, weights, shapes, 4096, [&](const Piece<T>& piece) {
    for (int64_t i = 0; i < piece.count; ++i)
      write(mode, static_cast<Wide<T>>(alpha), *piece.at[i], values[piece.first + i]);
  });
}

void scatter_delta(std::vector<Tensor> weights, Tensor values, const Tensor& rows, const Tensor& cols,
                   const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile, std::string write_mode,
                   double alpha) {
  const WriteMode mode = parse_write_mode(write_mode);
  check_scatter_delta(weights, values, rows, cols, tiles, local, tile, mode);
  const Worklist work(Order(rows, 0), Order(cols, 0), tiles, local, tile);
  const std::vector<Shape> shapes = shapes_of(weights);
  work.check_bounds("scatter_delta_", shapes);
  visit_float(weights[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<T*> data = data_of<T>(weights);
    if (values.scalar_type() == weights[0].scalar_type())
      scatter(data, shapes, values.mutable_data_ptr<T>(), work, mode, alpha);
    else
      scatter(data, shapes, values.mutable_data_ptr<float>(), work, mode, alpha);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("scatter_delta_", TORCH_BOX(&scatter_delta));
}

}  // namespace sparseft
