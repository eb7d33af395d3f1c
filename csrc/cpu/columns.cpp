// columns: chosen columns of a [T, *] matrix as the rows of a new one: what a sparse layer keeps of its input.
// norm_columns: the same of a norm's output, from the norm's input.
#include "columns.h"

#include <torch/csrc/stable/library.h>

#include "narrow.h"

namespace sparseft {
namespace {

// Bits are moved, not converted: one instance for each size of an element.
template <typename Bits>
void columns_as_rows(const Tensor& input, const Order& order, Tensor& out) {
  const Matrix<Bits> x{static_cast<const Bits*>(input.const_data_ptr()), input.size(0), input.size(1), input.stride(0),
                       input.stride(1)};
  Matrix<Bits> whole = x;
  whole.tokens = x.tokens / kStep<Bits> * kStep<Bits>;  // a step past the end would reach into the next row
  const Columns columns(order, 0, order.size, x);
  Bits* to = static_cast<Bits*>(out.mutable_data_ptr());
  // waking a thread costs as much as moving some 100,000 numbers
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, columns.block_size() * x.tokens));
  torch::stable::parallel_for(0, columns.blocks(), grain, [&](int64_t begin, int64_t end) {
    gather(whole, columns, begin, end, to, x.tokens);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t column = columns.first(block); column < columns.last(block); ++column)
        columns.each_row(column,
                         [&](int64_t row) { copy_column(x, column, whole.tokens, x.tokens, to + row * x.tokens); });
  });
}

Order checked(const char* op, const Tensor& input, const Tensor& cols) {
  STD_TORCH_CHECK(input.dim() == 2, op, ": input must be [T, K]");
  STD_TORCH_CHECK(is_supported(input.scalar_type()), op, ": input must be float32, float64, float16 or bfloat16, got ",
                  input.scalar_type());
  check_vector(op, "cols", cols, ScalarType::Int, cols.numel(), input);
  const Order order(cols, 0);
  for (int64_t i = 0; i < order.size; ++i)
    STD_TORCH_CHECK(order[i] >= 0 && order[i] < input.size(1), op, ": cols holds an index outside the matrix");
  return order;
}

Tensor columns(const Tensor& input, const Tensor& cols) {
  const Order order = checked("columns", input, cols);
  Tensor out = torch::stable::new_empty(input, {order.size, input.size(0)});
  switch (input.scalar_type()) {
    case ScalarType::Double:
      columns_as_rows<uint64_t>(input, order, out);
      break;
    case ScalarType::Float:
      columns_as_rows<uint32_t>(input, order, out);
      break;
    default:
      columns_as_rows<uint16_t>(input, order, out);
  }
  return out;
}

// In place: x of one column -> weight * round(x * rstd), rounded, as the norm's own operations round.
template <typename T>
SPARSEFT_CLONES void normalize(T* __restrict x, const float* __restrict rstd, float weight, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    T normed;
    narrow(widen(x[t]) * rstd[t], normed);
    narrow(weight * widen(normed), x[t]);
  }
}

Tensor norm_columns(const Tensor& input, const Tensor& rstd, const Tensor& weight, const Tensor& cols) {
  const char* op = "norm_columns";
  const Order order = checked(op, input, cols);
  check_vector(op, "rstd", rstd, ScalarType::Float, input.size(0), input);
  check_vector(op, "weight", weight, input.scalar_type(), input.size(1), input);
  Tensor out = columns(input, cols);
  const int64_t tokens = input.size(0);
  visit_narrow(input.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* weights = weight.const_data_ptr<T>();
    const float* scale = rstd.const_data_ptr<float>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, order.size, (1 << 16) / std::max<int64_t>(1, tokens) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i)
                                    normalize(to + i * tokens, scale, widen(weights[order[i]]), tokens);
                                });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def("columns(Tensor input, Tensor cols) -> Tensor");
  m.def("norm_columns(Tensor input, Tensor rstd, Tensor weight, Tensor cols) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("columns", TORCH_BOX(&columns));
  m.impl("norm_columns", TORCH_BOX(&norm_columns));
}

}  // namespace sparseft
