// fp32 and bf16 numbers in loops that the compiler turns into vectors: no branch, no call.
#pragma once

#include "../common.h"
#include "../rounding.h"
#include "simd.h"

namespace sparseft {

SPARSEFT_INLINE float widen(float x) {
  return x;
}
SPARSEFT_INLINE float widen(BFloat16 x) {
  return rounding::float_of(static_cast<uint32_t>(x.x) << 16);
}

SPARSEFT_INLINE void narrow(float x, float& to) {
  to = x;
}
// To the nearest, ties to even; NaN stays NaN.
SPARSEFT_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = rounding::bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.x = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// visit_narrow(dtype, op, f): as visit_float, of these two.
template <typename F>
void visit_narrow(ScalarType dtype, const char* op, F&& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": expected float32 or bfloat16, got ", dtype);
  if (dtype == ScalarType::Float) return f(Tag<float>{});
  f(Tag<BFloat16>{});
}

}  // namespace sparseft
