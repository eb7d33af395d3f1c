// The dot products of bf16 buffers by AVX-512 BF16: pairs of tokens are multiplied and added to 16 sums in fp32.
#include "columns.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4,avx512bf16")  // for all that follows
#include "dots.h"

namespace sparseft {

template <>
struct Multiply<BFloat16, 64> {
  static constexpr int64_t width = 32, parts = 1;
  using Vector = __m512bh;
  using Sum = VectorOf<float, kLanes>::type;
  static SPARSEFT_INLINE Vector load(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static SPARSEFT_INLINE void add(Sum& sum, const Vector& a, const Vector& b) {
    sum = (Sum)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};

bool has_bf16_dots() {
  return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
}

void bf16_dots_of_run(const Worklist& work, const Run& run, const Dots<BFloat16, float>& d) {
  dots_of_run<Multiply<BFloat16, 64>>(work, run, d);
}

}  // namespace sparseft

#else
#include "dots.h"

namespace sparseft {

bool has_bf16_dots() {
  return false;
}

void bf16_dots_of_run(const Worklist&, const Run&, const Dots<BFloat16, float>&) {}

}  // namespace sparseft
#endif
