// cross_entropy and its gradient at the logits, each row read where it lies: no copy in fp32, no logarithms of all
// probabilities. The meaning: sparseft/loss.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "exponential.h"
#include "narrow.h"

namespace sparseft {
namespace {

constexpr int64_t kLanes = 16;   // partial sums in fp32
constexpr int64_t kPart = 1024;  // numbers that they add up; totals are in fp64

// The logarithm of the sum of e^x, over `count` >= 1 numbers.
template <typename T>
SPARSEFT_CLONES float log_sum_exp(const T* __restrict x, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  float most[kLanes], largest = widen(x[0]);
  for (float& lane : most) lane = largest;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float value = widen(x[i + j]);
      most[j] = value > most[j] ? value : most[j];
    }
  for (int64_t i = whole; i < count; ++i) largest = std::max(largest, widen(x[i]));
  for (const float lane : most) largest = std::max(largest, lane);
  double total = 0;
  for (int64_t begin = 0; begin < whole; begin += kPart) {
    const int64_t end = begin + kPart < whole ? begin + kPart : whole;
    float sums[kLanes] = {};
    for (int64_t i = begin; i < end; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) sums[j] += exponential(widen(x[i + j]) - largest);
    for (const float sum : sums) total += sum;
  }
  for (int64_t i = whole; i < count; ++i) total += exponential(widen(x[i]) - largest);
  return static_cast<float>(largest + std::log(total));
}

template <typename T>
SPARSEFT_CLONES void row_backward(const T* __restrict x, int64_t count, float logsumexp, float grad,
                                  T* __restrict grad_x) {
  for (int64_t i = 0; i < count; ++i) narrow(exponential(widen(x[i]) - logsumexp) * grad, grad_x[i]);
}

void check(const char* op, const Tensor& logits, const Tensor& labels, int64_t ignored) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) >= 1, op,
                  ": logits must be [rows, classes] and contiguous");
  check_vector(op, "labels", labels, ScalarType::Long, logits.size(0), logits);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t classes = logits.size(1);
  for (int64_t i = 0; i < labels.numel(); ++i)
    STD_TORCH_CHECK(label[i] == ignored || (0 <= label[i] && label[i] < classes), op, ": labels must be ", ignored,
                    " or 0 to ", classes - 1, ", got ", label[i]);
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, int64_t ignored) {
  const char* op = "cross_entropy";
  check(op, logits, labels, ignored);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  visit_narrow(logits.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = logits.const_data_ptr<T>();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    float *loss = losses.mutable_data_ptr<float>(), *sum = sums.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool there = label[i] != ignored;
        sum[i] = there ? log_sum_exp(x + i * classes, classes) : 0.0f;
        loss[i] = there ? sum[i] - widen(x[i * classes + label[i]]) : 0.0f;
      }
    });
  });
  return {losses, sums};
}

Tensor cross_entropy_backward(const Tensor& grad_losses, const Tensor& logits, const Tensor& labels,
                              const Tensor& logsumexp, int64_t ignored) {
  const char* op = "cross_entropy_backward";
  check(op, logits, labels, ignored);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_vector(op, "grad_losses", grad_losses, ScalarType::Float, rows, logits);
  check_vector(op, "logsumexp", logsumexp, ScalarType::Float, rows, logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, classes});
  visit_narrow(logits.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = logits.const_data_ptr<T>();
    T* grad_x = grad_logits.mutable_data_ptr<T>();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const float *grad = grad_losses.const_data_ptr<float>(), *sum = logsumexp.const_data_ptr<float>();
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = grad_x + i * classes;
        if (label[i] == ignored) {
          std::fill_n(row, classes, T{});
          continue;
        }
        row_backward(x + i * classes, classes, sum[i], grad[i], row);
        const float probability = std::exp(widen(x[i * classes + label[i]]) - sum[i]);
        narrow((probability - 1.0f) * grad[i], row[label[i]]);
      }
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def("cross_entropy(Tensor logits, Tensor labels, int ignored) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor labels, Tensor logsumexp, int ignored) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace sparseft
