// Stochastic rounding to 16 bits: up with the probability of the part that is cut off, so that the expected result is
// the number itself. Random bits are a function of (seed, step, entry) alone. The meaning: sparseft/reference.py.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPARSEFT_EVERYWHERE __host__ __device__ inline
#else
#define SPARSEFT_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace sparseft {

// SplitMix64 (Steele, Lea & Flood, 2014): its output function, and output `number` of the generator seeded with `seed`.
SPARSEFT_EVERYWHERE uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

SPARSEFT_EVERYWHERE uint64_t random_word(uint64_t seed, int64_t number) {
  return mix(seed + static_cast<uint64_t>(number) * 0x9e3779b97f4a7c15u);
}

// 16 random bits of an entry; `key` is random_word(seed, step of its layer).
SPARSEFT_EVERYWHERE uint32_t random_bits(uint64_t key, int64_t entry) {
  return static_cast<uint32_t>(random_word(key, entry) >> 48);
}

namespace rounding {

SPARSEFT_EVERYWHERE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

SPARSEFT_EVERYWHERE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The last `cut` bits of the mantissa, made up to the next number away from zero or cut off.
SPARSEFT_EVERYWHERE float cut_mantissa(uint32_t bits, int cut, uint32_t random) {
  return float_of((bits + (random >> (16 - cut))) & ~((1u << cut) - 1));
}

}  // namespace rounding

// Infinities and NaN become what a cast makes of them.
SPARSEFT_EVERYWHERE void round_stochastically(float x, uint32_t random, torch::headeronly::BFloat16& to) {
  const uint32_t bits = rounding::bits_of(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  to = static_cast<torch::headeronly::BFloat16>(finite ? rounding::cut_mantissa(bits, 16, random) : x);
}

SPARSEFT_EVERYWHERE void round_stochastically(float x, uint32_t random, torch::headeronly::Half& to) {
  const uint32_t bits = rounding::bits_of(x), sign = bits & 0x80000000u;
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const float size = rounding::float_of(bits ^ sign);
  if (size < 0x1p-14f) {  // subnormal: whole steps of 2^-24
    const auto steps = (static_cast<uint32_t>(size * 0x1p40f) + random) >> 16;
    x = rounding::float_of(rounding::bits_of(static_cast<float>(steps) * 0x1p-24f) | sign);
  } else if (finite) {
    x = rounding::cut_mantissa(bits, 13, random);
  }
  to = static_cast<torch::headeronly::Half>(x);
}

}  // namespace sparseft
