// silu_product_backward: the gradients of silu(gate) * up at both factors, in one pass. The meaning: sparseft/gated.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "exponential.h"
#include "narrow.h"

namespace sparseft {
namespace {

template <typename T>
SPARSEFT_CLONES void backward(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                              T* __restrict grad_gate, T* __restrict grad_up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = widen(grad[i]), x = widen(gate[i]);
    const float sigmoid = x < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)), silu = x * sigmoid;
    narrow(g * silu, grad_up[i]);
    narrow(g * widen(up[i]) * (sigmoid + silu * (1.0f - sigmoid)), grad_gate[i]);
  }
}

std::tuple<Tensor, Tensor> silu_product_backward(const Tensor& grad_out, const Tensor& gate, const Tensor& up) {
  const char* op = "silu_product_backward";
  check_vector(op, "gate", gate, gate.scalar_type(), gate.numel(), gate);
  check_vector(op, "up", up, gate.scalar_type(), gate.numel(), gate);
  check_vector(op, "grad_out", grad_out, gate.scalar_type(), gate.numel(), gate);
  const int64_t count = gate.numel();
  Tensor grad_gate = torch::stable::new_empty(gate, {count}), grad_up = torch::stable::new_empty(gate, {count});
  visit_narrow(gate.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *g = grad_out.const_data_ptr<T>(), *x = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T *to_gate = grad_gate.mutable_data_ptr<T>(), *to_up = grad_up.mutable_data_ptr<T>();
    // waking a thread costs as much as some 30,000 numbers
    torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
      backward(g + begin, x + begin, u + begin, to_gate + begin, to_up + begin, end - begin);
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def("silu_product_backward(Tensor grad_out, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("silu_product_backward", TORCH_BOX(&silu_product_backward));
}

}  // namespace sparseft
