// In the toolkit's place where csrc/'s host code is compiled for the tests: declarations alone. runtime.cpp has what
// the host calls; what kernels call is never defined, since build.py leaves their bodies out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Of the host ----------------------------------------------------------------------------------------------------------

#define STUB_ERRORS(X)                                                                                              \
  X(cudaSuccess, 0) X(cudaErrorInvalidValue, 1) X(cudaErrorMemoryAllocation, 2) X(cudaErrorInvalidConfiguration, 9) \
  X(cudaErrorInsufficientDriver, 35) X(cudaErrorNoDevice, 100) X(cudaErrorInvalidDevice, 101)                       \
  X(cudaErrorNoKernelImageForDevice, 209) X(cudaErrorUnsupportedPtxVersion, 222)                                    \
  X(cudaErrorInvalidResourceHandle, 400) X(cudaErrorIllegalAddress, 700) X(cudaErrorNotSupported, 801)

enum cudaError_t {
#define X(name, value) name = value,
  STUB_ERRORS(X)
#undef X
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };

typedef struct CUstream_st* cudaStream_t;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

extern "C" {
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* found);
}

namespace stub {

// What a kernel says of itself in the place of its body, while `launch` calls it.
void entered(const char* name, int launch_bounds);

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t before_launch();
// Checks a launch by CUDA's rules and writes it down. `words`: the parameters, 8 bytes at a time.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const unsigned char* parameters, size_t bytes);

template <class... Params>
cudaError_t launch_typed(void (*kernel)(Params...), const cudaLaunchConfig_t& config, const Params&... params) {
  // As a kernel's parameters lie: each at a multiple of its alignment.
  unsigned char bytes[(0 + ... + (sizeof(Params) + alignof(Params)))] = {};
  size_t at = 0;
  const auto put = [&](const auto& param) {
    using T = std::decay_t<decltype(param)>;
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    __builtin_memcpy(bytes + at, &param, sizeof(T));
    at += sizeof(T);
  };
  (put(params), ...);
  kernel(params...);
  return launch(reinterpret_cast<const void*>(kernel), config, bytes, at);
}

// kernel<<<grid, threads, shared_bytes, stream>>>(params...)
template <class... Params>
void launch_chevrons(void (*kernel)(Params...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                     const Params&... params) {
  launch_typed(kernel, cudaLaunchConfig_t{grid, threads, shared_bytes, stream, nullptr, 0}, params...);
}

}  // namespace stub

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return stub::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Params, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Given&&... given) {
  return stub::launch_typed<Params...>(kernel, *config, given...);
}

// Of kernels -----------------------------------------------------------------------------------------------------------

struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
extern const dim3 threadIdx, blockIdx, gridDim, blockDim;
void __syncthreads();
void __syncwarp();
template <class T>
T __shfl_xor_sync(unsigned, T, int);
bool __all_sync(unsigned, bool);
size_t __cvta_generic_to_shared(const void*);
template <class T>
T __ldg(const T*);
template <class T>
void __stwb(T*, T);
uint4 make_uint4(unsigned, unsigned, unsigned, unsigned);
float2 make_float2(float, float);
float __uint_as_float(unsigned);
unsigned __float_as_uint(float);
