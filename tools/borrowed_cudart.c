/* Stands in for libcudart_static.a, which no cu12 package of PyPI has: every function of the CUDA runtime that the
   library uses is looked up in the process, where a CUDA build of torch has loaded its libcudart. The library then names
   no libcudart of a certain version, and loads beside a torch without CUDA too, where nothing of it is ever called. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>

/* The function of that name in the process, or 0. Not inlined: one lookup each time is cheap beside a launch. */
static void* runtime(const char* name) {
  return dlsym(RTLD_DEFAULT, name);
}

#define BORROW(type, name, parameters, arguments, absent)     \
  __attribute__((visibility("hidden"))) type name parameters { \
    static type(*found) parameters;                           \
    if (!found) found = (type(*) parameters)runtime(#name);   \
    return found ? found arguments : absent;                  \
  }

BORROW(cudaError_t, cudaLaunchKernel,
       (const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream),
       (kernel, grid, block, arguments, shared, stream), cudaErrorInitializationError)
BORROW(cudaError_t, cudaFuncSetAttribute, (const void* kernel, enum cudaFuncAttribute attribute, int value),
       (kernel, attribute, value), cudaErrorInitializationError)
BORROW(cudaError_t, cudaGetLastError, (void), (), cudaErrorInitializationError)
BORROW(const char*, cudaGetErrorString, (cudaError_t error), (error), "this torch brings no CUDA runtime")

/* What a compiler calls to register a library's kernels and to launch one. */
BORROW(void**, __cudaRegisterFatBinary, (void* binary), (binary), 0)
BORROW(int, __cudaRegisterFunction,
       (void** binary, const char* host, char* device, const char* name, int limit, void* thread, void* block,
        void* block_size, void* grid_size, int* warp_size),
       (binary, host, device, name, limit, thread, block, block_size, grid_size, warp_size), 0)
BORROW(unsigned, __cudaPushCallConfiguration, (dim3 grid, dim3 block, size_t shared, void* stream),
       (grid, block, shared, stream), 1)
BORROW(cudaError_t, __cudaPopCallConfiguration, (dim3 * grid, dim3* block, size_t* shared, void* stream),
       (grid, block, shared, stream), cudaErrorInitializationError)

/* These two return nothing. */
void __attribute__((visibility("hidden"))) __cudaRegisterFatBinaryEnd(void** binary) {
  void (*found)(void**) = (void (*)(void**))runtime("__cudaRegisterFatBinaryEnd");
  if (found) found(binary);
}
void __attribute__((visibility("hidden"))) __cudaUnregisterFatBinary(void** binary) {
  void (*found)(void**) = (void (*)(void**))runtime("__cudaUnregisterFatBinary");
  if (found) found(binary);
}
