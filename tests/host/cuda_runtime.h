// In the toolkit's place where csrc/ is compiled for the host: the words of CUDA that ptx.cuh does not hide.
#pragma once

#include <cstddef>
#include <cstdint>

#define CUDART_VERSION 0

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL  // ptx_host90.h

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
};

inline const char* cudaGetErrorName(cudaError_t error) {
#define FUSEDLOSS_NAME(value) \
  if (error == value) return #value
  FUSEDLOSS_NAME(cudaSuccess);
  FUSEDLOSS_NAME(cudaErrorInvalidValue);
  FUSEDLOSS_NAME(cudaErrorInvalidConfiguration);
  FUSEDLOSS_NAME(cudaErrorInvalidDevice);
  FUSEDLOSS_NAME(cudaErrorNoKernelImageForDevice);
  FUSEDLOSS_NAME(cudaErrorNotSupported);
#undef FUSEDLOSS_NAME
  return "unknown error";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

typedef struct CUstream_st* cudaStream_t;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What the sm_90 kernel's launch asks for: an H100.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
