// Every PTX instruction the kernels use, each in one inline function. tests/emulator/emulator.h defines the same
// functions for the host, from the definitions in the PTX manual.
#pragma once

#include <cstdint>

namespace sparseft {

// Memory words through which blocks of one launch talk: value and state in one word, so no ordering with other
// memory is needed.
__device__ inline uint64_t poll(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void publish(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

}  // namespace sparseft
