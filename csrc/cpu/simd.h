// Run-time choice of the instruction set, with one source for all of them.
#pragma once

// A function marked SPARSEFT_CLONES is compiled for AVX-512, for AVX2 + FMA and for the baseline; the loader picks one
// by the CPU it finds. Clones do not reach into callees: what such a function calls must be SPARSEFT_INLINE.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSEFT_X86
#define SPARSEFT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SPARSEFT_AVX512 __attribute__((target("arch=x86-64-v4")))  // to be called only if has_avx512()
#define SPARSEFT_AVX2 __attribute__((target("arch=x86-64-v3")))    // to be called only if has_avx2()
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("x86-64-v4");
  return has;
}
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("x86-64-v3");
  return has;
}
#else
#define SPARSEFT_CLONES
#define SPARSEFT_AVX512
inline bool has_avx512() {
  return false;
}
#endif
#define SPARSEFT_INLINE inline __attribute__((always_inline))

// Vectors that are wider than the baseline's registers never cross a call: who takes or returns them is inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
