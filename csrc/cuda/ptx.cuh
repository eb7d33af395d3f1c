// Every PTX instruction the kernels use, each in one inline function. tests/emulator/emulator.h defines the same
// functions for the host, from the definitions in the PTX manual.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

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

// Reads global memory in the widest words. A plain copy of a struct may be split into its elements; this is not.
template <size_t bytes>
__device__ void load_words(void* to, const void* from) {
  const size_t address = __cvta_generic_to_global(from);
  if constexpr (bytes % 16 == 0) {
    for (size_t i = 0; i < bytes; i += 16) {
      uint32_t word[4];
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "l"(address + i)
                   : "memory");
      memcpy(static_cast<char*>(to) + i, word, 16);
    }
  } else {
    static_assert(bytes == 8, "vectors have 8 bytes or a multiple of 16");
    uint32_t word[2];
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(address) : "memory");
    memcpy(to, word, 8);
  }
}

// Copies 16 bytes from global to shared memory in the background; of these the first `bytes` are read, the rest
// become zeros.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes)
               : "memory");
}

// Ends a group of copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits until at most the `newest` last groups of this thread are under way.
template <int newest>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(newest) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed. Lanes 8 i to 8 i + 7 point to the eight rows of matrix i; lane l
// receives, of each matrix, elements (row 2 (l % 4), column l / 4) and (row 2 (l % 4) + 1, column l / 4).
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same without transposing: lane l receives elements (row l / 4, column 2 (l % 4)) and (row l / 4, column
// 2 (l % 4) + 1).
__device__ inline void load_matrices_plain(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8) on the tensor cores, summed in fp32. With g = lane / 4 and q = lane % 4:
// c holds (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1); a's registers hold two neighbours each, from (g, 2q),
// (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8); b's hold (2q, g), (2q + 1, g) and (2q + 8, g), (2q + 9, g).
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace sparseft
