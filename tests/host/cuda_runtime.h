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
