// e^x in loops that the compiler turns into vectors.
#pragma once

#include "../rounding.h"
#include "simd.h"

namespace sparseft {

// e^x to two units in the last place, for |x| <= 87 (further out: that of the nearest such x). x = n ln 2 + r, and e^r
// as its Taylor series, the last coefficients of which are adjusted (Cephes' expf: Moshier, 1992).
SPARSEFT_INLINE float exponential(float x) {
  constexpr float kShift = 0x1.8p23f;  // what is added to it is rounded to an integer, in the last bits
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * rounding::float_of((rounding::bits_of(shifted) << 23) + 0x3f800000u);  // times 2^n
}

}  // namespace sparseft
