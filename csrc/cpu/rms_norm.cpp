// rms_norm_backward: the gradients of weight * x / rms(x) at x and at the weight, in two passes over a row that is in
// the first-level cache. The meaning: sparseft/norms.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "narrow.h"

namespace sparseft {
namespace {

constexpr int64_t kLanes = 16;   // partial sums of a row's product
constexpr int64_t kBlocks = 64;  // of rows: sums over rows are taken inside blocks first, whoever computes them

template <typename T>
struct Rows {
  const T* grad;  // [rows, width]
  const T* x;
  const float* rstd;    // [rows]
  const float* weight;  // [width]
  T* grad_x;
  int64_t width;
};

// Row `r`; adds to grad_weight [width].
template <typename T>
SPARSEFT_CLONES void row_backward(const Rows<T>& rows, int64_t r, float* __restrict grad_weight) {
  const int64_t width = rows.width, whole = width / kLanes * kLanes;
  const T* __restrict grad = rows.grad + r * width;
  const T* __restrict x = rows.x + r * width;
  const float* __restrict weight = rows.weight;
  T* __restrict grad_x = rows.grad_x + r * width;
  const float rstd = rows.rstd[r];

  float sums[kLanes] = {}, product = 0;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += widen(grad[i + j]) * weight[i + j] * widen(x[i + j]);
  for (int64_t i = whole; i < width; ++i) product += widen(grad[i]) * weight[i] * widen(x[i]);
  for (const float sum : sums) product += sum;
  const float along = product * rstd / static_cast<float>(width);

  for (int64_t i = 0; i < width; ++i) {
    const float g = widen(grad[i]), normed = widen(x[i]) * rstd;
    grad_weight[i] += g * normed;
    narrow((g * weight[i] - normed * along) * rstd, grad_x[i]);
  }
}

template <typename T>
void backward(const Rows<T>& rows, int64_t count, float* grad_weight) {
  const int64_t size = std::max<int64_t>(1, (count + kBlocks - 1) / kBlocks);  // rows of a block
  const int64_t blocks = (count + size - 1) / size;
  std::vector<float> sums(static_cast<size_t>(blocks * rows.width));
  // waking a thread costs as much as some 30,000 numbers
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, size * rows.width));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t r = block * size; r < std::min(count, (block + 1) * size); ++r)
        row_backward(rows, r, sums.data() + block * rows.width);
  });
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < rows.width; ++i) grad_weight[i] += sums[static_cast<size_t>(block * rows.width + i)];
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_out, const Tensor& input, const Tensor& rstd,
                                             const Tensor& weight) {
  const char* op = "rms_norm_backward";
  STD_TORCH_CHECK(input.dim() == 2 && input.is_contiguous(), op, ": input must be [T, K] and contiguous");
  check_dtype(op, "grad_out", grad_out, input.scalar_type());
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(0) == input.size(0) && grad_out.size(1) == input.size(1) &&
                      grad_out.is_contiguous(),
                  op, ": grad_out must be of the input's shape and contiguous");
  check_device(op, "grad_out", grad_out, input);
  check_vector(op, "rstd", rstd, ScalarType::Float, input.size(0), input);
  check_vector(op, "weight", weight, ScalarType::Float, input.size(1), input);
  Tensor grad_input = torch::stable::new_empty(input, {input.size(0), input.size(1)});
  Tensor grad_weight = torch::stable::new_zeros(weight, {input.size(1)});
  visit_narrow(input.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rows<T> rows{grad_out.const_data_ptr<T>(),   input.const_data_ptr<T>(),        rstd.const_data_ptr<float>(),
                       weight.const_data_ptr<float>(), grad_input.mutable_data_ptr<T>(), input.size(1)};
    backward(rows, input.size(0), grad_weight.mutable_data_ptr<float>());
  });
  return {grad_input, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def("rms_norm_backward(Tensor grad_out, Tensor input, Tensor rstd, Tensor weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace sparseft
