// What the four operations' CUDA code shares: the host side of a call, vectorised memory access, tables of records.
//
// The same sources compile twice. nvcc makes the library; the host compiler, with tests/emulator/emulator.h supplying
// the CUDA names, makes a library for CPU tensors in which every thread runs as a fiber under checks. Rules that keep
// this possible: shared memory only through shared_memory(), vector access only through load() and store(), PTX only
// in ptx.cuh, device memory only through a Call (the emulator learns its bounds there).
#pragma once

#ifdef SPARSEFT_EMULATED
#include "emulator.h"
#define SPARSEFT_CUDA_KEY CPU
#else
#include <cuda_runtime.h>
#include <dlfcn.h>

#include "ptx.cuh"
#define SPARSEFT_CUDA_KEY CUDA
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common.h"

// Registers the operations of one source: SPARSEFT_CUDA_OPS(m) { m.impl(...); }
#define SPARSEFT_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(sparseft_cuda, SPARSEFT_CUDA_KEY, m)

namespace sparseft {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// ---- memory access in kernels --------------------------------------------------------------------------------------

// N neighbours that move in one access of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};

#ifndef SPARSEFT_EMULATED
enum class Access { read, write, write_fresh };
template <typename T>
void allow(const T*, int64_t, Access) {}

// From global memory, in accesses of 16 bytes where the size allows it.
template <typename V>
__device__ V load(const V* from) {
  V value;
  load_words<sizeof(V)>(&value, from);
  return value;
}

template <typename V>
__device__ void store(V* to, const V& value) {
  *to = value;
}

// The block's shared memory, as the kernel's own struct; its size is given at the launch.
template <typename S>
__device__ S& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<S*>(bytes);
}
#endif

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- the host side of a call -----------------------------------------------------------------------------------

// One call of an operation: makes the tensors' device current, finds torch's current stream on it, hands out
// pointers, keeps workspaces alive until everything is launched. Never waits for the device.
class Call {
 public:
  explicit Call(const Tensor& like) : like_(like) {
#ifdef SPARSEFT_EMULATED
    emulator::begin_call();
#else
    guard_.emplace(like.get_device_index());
    stream_ = current_stream(like.get_device_index());
#endif
  }

  template <typename T>
  const T* input(const Tensor& tensor) const {
    const T* data = static_cast<const T*>(tensor.const_data_ptr());
    allow(data, span(tensor), Access::read);
    return data;
  }

  template <typename T>
  const T* input(const std::optional<Tensor>& tensor) const {
    return tensor ? input<T>(*tensor) : nullptr;
  }

  // `fresh`: the kernels read nothing of what is there now.
  template <typename T>
  T* output(const Tensor& tensor, bool fresh = false) const {
    T* data = static_cast<T*>(tensor.mutable_data_ptr());
    allow(data, span(tensor), fresh ? Access::write_fresh : Access::write);
    return data;
  }

  template <typename T>
  T* workspace(int64_t count) {
    return keep<T>(torch::stable::new_empty(like_, {bytes<T>(count)}, ScalarType::Byte), Access::write_fresh);
  }

  template <typename T>
  T* zeros(int64_t count) {
    return keep<T>(torch::stable::new_zeros(like_, {bytes<T>(count)}, ScalarType::Byte), Access::write);
  }

  // `shared`: bytes of shared memory per block.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Arguments... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "sparseft: a launch of ", blocks, " blocks is too large for CUDA");
#ifdef SPARSEFT_EMULATED
    emulator::launch(blocks, threads, shared, [=] { kernel(arguments...); });
#else
    if (shared > (48 << 10)) {  // more than every device grants unasked
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    // clang-format would split the >>>
    // clang-format off
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(arguments...);
    // clang-format on
    check(cudaGetLastError());
#endif
  }

 private:
  // Elements from the first to the last one, gaps of a strided matrix included.
  static int64_t span(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) == 0) return 0;
      last += (tensor.size(i) - 1) * tensor.stride(i);
    }
    return last + 1;
  }

  template <typename T>
  T* keep(const Tensor& memory, Access access) {
    kept_.push_back(memory);
    T* data = static_cast<T*>(memory.mutable_data_ptr());
    allow(data, memory.numel() / static_cast<int64_t>(sizeof(T)), access);
    return data;
  }

  template <typename T>
  static int64_t bytes(int64_t count) {
    return count * static_cast<int64_t>(sizeof(T));
  }

#ifndef SPARSEFT_EMULATED
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "sparseft: CUDA error: ", cudaGetErrorString(error));
  }

  // Looked up at run time: without a reference to libtorch_cuda this library also loads next to a CPU-only torch. In
  // that library by name: torch loads its libraries locally, so that RTLD_DEFAULT does not see them.
  static cudaStream_t current_stream(int32_t device) {
    using Lookup = int32_t (*)(int32_t, void**);
    static void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    static const auto lookup = torch_cuda == nullptr
                                   ? nullptr
                                   : reinterpret_cast<Lookup>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
    void* stream = nullptr;
    STD_TORCH_CHECK(lookup != nullptr && lookup(device, &stream) == 0, "sparseft: torch has no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
#endif
  Tensor like_;
  std::vector<Tensor> kept_;
};

// ---- tables ------------------------------------------------------------------------------------------------------

constexpr int kFew = 48;

template <typename R>
struct Records {
  R at[kFew];
};

// Records that a kernel indexes (a weight each, a score tensor each). A few travel in the kernel's argument, more
// through device memory.
template <typename R>
struct Table {
  Records<R> few;
  const R* many = nullptr;
  int64_t count = 0;

  __device__ const R& operator[](int64_t i) const { return many != nullptr ? many[i] : few.at[i]; }
};

template <typename R>
__global__ void store_records(R* to, Records<R> records, int count) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = records.at[threadIdx.x];
}

// Arguments are copied at the launch, so that a captured graph replays them; a copy from host memory would not last.
template <typename R>
Table<R> make_table(Call& call, const std::vector<R>& records) {
  Table<R> table{};
  table.count = static_cast<int64_t>(records.size());
  R* many = table.count > kFew ? call.workspace<R>(table.count) : nullptr;
  for (int64_t first = 0; first < table.count; first += kFew) {
    const int count = static_cast<int>(std::min<int64_t>(kFew, table.count - first));
    std::copy_n(records.begin() + first, count, table.few.at);
    if (many != nullptr) call.launch(store_records<R>, 1, 64, 0, many + first, table.few, count);
  }
  table.many = many;
  return table;
}

// ---- entries -----------------------------------------------------------------------------------------------------

// Whether 0 <= index < size.
__host__ __device__ inline bool is_inside(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

// The worklist, as kernels see it (the tensors: sparseft/reference.py). Its tiles ascend in entry0.
//
// The device's memory cannot be checked without waiting for it. So kernels check what they read before they follow it:
// in a wrong worklist, entries that point outside are passed over, and nothing outside a tensor is touched.
struct Entries {
  const int32_t* rows;
  const int32_t* cols;
  int64_t row_count, col_count;  // active ones
  const Tile* tiles;
  int64_t tile_count;
  const uint16_t* local;
  int64_t count;  // k
  int tile_rows, tile_cols;
  uint64_t reciprocal;  // ceil(2^32 / tile_cols): exact for the division of 16-bit positions

  // A tile; a wrong one has only those of its entries that exist, or none.
  __device__ Tile tile(int64_t number) const {
    Tile tile = tiles[number];
    tile.entry0 = min(max(tile.entry0, int64_t{0}), count);
    tile.entry1 = min(tile.entry1, count);
    if (!is_inside(tile.row0, row_count) || !is_inside(tile.col0, col_count)) {
      tile = {tile.layer, 0, 0, tile.entry0, tile.entry0};
    }
    return tile;
  }

  // Row and column inside the tile.
  __device__ int row(unsigned position) const { return static_cast<int>(position * reciprocal >> 32); }
  __device__ int col(unsigned position) const { return static_cast<int>(position) - row(position) * tile_cols; }
};

inline Entries make_entries(const Call& call, const std::optional<Tensor>& rows, const std::optional<Tensor>& cols,
                            const Tensor& tiles, const Tensor& local, const std::vector<int64_t>& tile) {
  constexpr int64_t any = int64_t{1} << 62;  // of a compact operand: its own width decides
  return {call.input<int32_t>(rows),
          call.input<int32_t>(cols),
          rows ? rows->numel() : any,
          cols ? cols->numel() : any,
          reinterpret_cast<const Tile*>(call.input<int64_t>(tiles)),
          tiles.size(0),
          call.input<uint16_t>(local),
          local.numel(),
          static_cast<int>(tile[0]),
          static_cast<int>(tile[1]),
          ((uint64_t{1} << 32) + tile[1] - 1) / tile[1]};
}

// The first tile that ends behind `entry`. All lanes of the warp search together, 32 probes a step.
__device__ inline int64_t first_tile(const Entries& entries, int64_t entry) {
  const int lane = threadIdx.x % kWarp;
  int64_t low = 0, high = entries.tile_count;  // it lies in [low, high]
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t probe = low + step * (lane + 1) - 1;
    const bool before = probe < high && entries.tiles[probe].entry1 <= entry;
    low += step * __popc(__ballot_sync(kWholeWarp, before));
    high = min(high, low + step - 1);
  }
  return low;
}

}  // namespace sparseft
