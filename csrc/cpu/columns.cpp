// columns: chosen columns of a [T, *] matrix as the rows of a new one: what a sparse layer keeps of its input.
#include "columns.h"

#include <torch/csrc/stable/library.h>

namespace sparseft {
namespace {

// Bits are moved, not converted: one instance for each size of an element.
template <typename Bits>
void columns_as_rows(const Tensor& input, const Order& order, Tensor& out) {
  const Matrix<Bits> x{static_cast<const Bits*>(input.const_data_ptr()), input.size(0), input.size(1), input.stride(0),
                       input.stride(1)};
  const Columns columns(order, 0, order.size, x.width);
  Bits* to = static_cast<Bits*>(out.mutable_data_ptr());
  const int64_t whole = x.tokens / kStep<Bits> * kStep<Bits>;  // a step past the end would reach into the next row
  // waking a thread costs as much as moving some 100,000 numbers
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, columns.block_size() * x.tokens));
  torch::stable::parallel_for(0, columns.blocks(), grain, [&](int64_t begin, int64_t end) {
    gather<Bits, Bits>(x, columns, begin, end, whole, to, x.tokens);
    for (int64_t block = begin; block < end; ++block)
      for (const Columns::Item* item = columns.begin(block); item != columns.end(block); ++item)
        for (int64_t t = whole; t < x.tokens; ++t)
          to[item->row * x.tokens + t] = x.data[item->column * x.column_stride + t * x.token_stride];
  });
}

Tensor columns(const Tensor& input, const Tensor& cols) {
  const char* op = "columns";
  STD_TORCH_CHECK(input.dim() == 2, op, ": input must be [T, K]");
  STD_TORCH_CHECK(is_supported(input.scalar_type()), op, ": input must be float32, float64, float16 or bfloat16, got ",
                  input.scalar_type());
  check_vector(op, "cols", cols, ScalarType::Int, cols.numel(), input);
  const Order order(cols, 0);
  for (int64_t i = 0; i < order.size; ++i)
    STD_TORCH_CHECK(order[i] >= 0 && order[i] < input.size(1), op, ": cols holds an index outside the matrix");
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def("columns(Tensor input, Tensor cols) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("columns", TORCH_BOX(&columns));
}

}  // namespace sparseft
