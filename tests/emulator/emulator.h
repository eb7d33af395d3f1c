// The CUDA names that csrc/cuda uses, for the host compiler. Kernels compiled against this header run on the CPU:
// every thread is a fiber, and emulator.cpp schedules the fibers in a seeded random order and checks what they do.
//
// Memory accesses reach the checks through the compiler: the kernels are built with -fsanitize=thread, and
// emulator.cpp takes the place of the sanitizer's run-time library. No kernel source needs a wrapper for that.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define EMULATOR_INLINE inline __attribute__((always_inline))

using std::max;
using std::min;

namespace emulator {

struct Index {
  unsigned x, y = 0, z = 0;
};

// Where a thread waits; barriers and atomics are named by it ("select_topk.cu:120") when a test removes one.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && strcmp(file, other.file) == 0; }
};
#define EMULATOR_PLACE emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

Index thread_index();
Index block_index();
Index block_size();

void begin_call();
void allow_memory(const void* begin, size_t bytes, size_t element, bool writable, bool initialised);
void launch_kernel(int64_t blocks, int threads, size_t shared, void (*run)(const void*), const void* arguments,
                   size_t argument_bytes);

// `kernel` holds the arguments: the only memory of the host that the threads may read.
template <typename F>
void launch(int64_t blocks, int threads, size_t shared, const F& kernel) {
  launch_kernel(blocks, threads, shared, [](const void* k) { (*static_cast<const F*>(k))(); }, &kernel, sizeof(kernel));
}

void* shared_bytes(size_t bytes);
void read(void* to, const void* from, size_t bytes, size_t alignment);
void write(void* to, const void* from, size_t bytes, size_t alignment);

int barrier(bool predicate, Place place);  // returns how many threads' predicates held
void warp_barrier(unsigned mask, Place place);
unsigned ballot(unsigned mask, bool predicate, Place place);
void shuffle(unsigned mask, const void* mine, void* other, size_t bytes, int source, Place place);

uint32_t atomic_add(uint32_t* to, uint32_t value, Place place);
unsigned long long atomic_add(unsigned long long* to, unsigned long long value, Place place);
uint32_t atomic_or(uint32_t* to, uint32_t value, Place place);
uint64_t atomic_load(const uint64_t* from, Place place);
void atomic_store(uint64_t* to, uint64_t value, Place place);

void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int newest, Place place);
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Place place);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t), Place place);

}  // namespace emulator

// ---- CUDA's names ------------------------------------------------------------------------------------------------

inline void __syncthreads(EMULATOR_PLACE) {
  emulator::barrier(false, place);
}
inline int __syncthreads_or(bool predicate, EMULATOR_PLACE) {
  return emulator::barrier(predicate, place) > 0;
}
inline int __syncthreads_count(bool predicate, EMULATOR_PLACE) {
  return emulator::barrier(predicate, place);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_PLACE) {
  emulator::warp_barrier(mask, place);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, EMULATOR_PLACE) {
  return emulator::ballot(mask, predicate, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATOR_PLACE) {
  T other;
  emulator::shuffle(mask, &value, &other, sizeof(T), source % 32, place);
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_PLACE) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits, place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, EMULATOR_PLACE) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane, place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, EMULATOR_PLACE) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane + distance < 32 ? lane + distance : lane, place);
}

template <typename T>
EMULATOR_INLINE T atomicAdd(T* to, T value, EMULATOR_PLACE) {
  return emulator::atomic_add(to, value, place);
}
EMULATOR_INLINE uint32_t atomicOr(uint32_t* to, uint32_t value, EMULATOR_PLACE) {
  return emulator::atomic_or(to, value, place);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits));
}

// ---- what common.cuh and ptx.cuh define on the device -----------------------------------------------------------

namespace sparseft {

enum class Access { read, write, write_fresh };

template <typename T>
void allow(const T* begin, int64_t count, Access access) {
  emulator::allow_memory(begin, static_cast<size_t>(count) * sizeof(T), std::min<size_t>(sizeof(T), 8),
                         access != Access::read, access != Access::write_fresh);
}

template <typename V>
EMULATOR_INLINE V load(const V* from) {
  V value;
  emulator::read(&value, from, sizeof(V), alignof(V));
  return value;
}

// By value: where it comes from memory, the kernel reads it there, under the checks.
template <typename V>
EMULATOR_INLINE void store(V* to, V value) {
  emulator::write(to, &value, sizeof(V), alignof(V));
}

template <typename S>
S& shared_memory() {
  return *static_cast<S*>(emulator::shared_bytes(sizeof(S)));
}

inline uint64_t poll(const uint64_t* word, EMULATOR_PLACE) {
  return emulator::atomic_load(word, place);
}
inline void publish(uint64_t* word, uint64_t value, EMULATOR_PLACE) {
  emulator::atomic_store(word, value, place);
}

EMULATOR_INLINE void copy_async(void* to, const void* from, int bytes) {
  emulator::copy_async(to, from, bytes);
}
inline void commit_copies() {
  emulator::commit_copies();
}

template <int newest>
void wait_for_copies(EMULATOR_PLACE) {
  emulator::wait_for_copies(newest, place);
}

EMULATOR_INLINE void load_matrices(uint32_t (&to)[4], const void* row, EMULATOR_PLACE) {
  emulator::load_matrices(to, row, true, place);
}
EMULATOR_INLINE void load_matrices_plain(uint32_t (&to)[4], const void* row, EMULATOR_PLACE) {
  emulator::load_matrices(to, row, false, place);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_PLACE) {
  const auto value = [](uint16_t bits) {
    T element;
    memcpy(&element, &bits, sizeof(element));
    return static_cast<float>(element);
  };
  emulator::multiply_add(c, a, b, value, place);
}

}  // namespace sparseft
