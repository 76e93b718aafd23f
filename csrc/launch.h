// A kernel launch that both compilers read: nvcc's, and in the tests the host's.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#ifdef FUSEDLOSS_HOST
#include "launch_host.h"  // the same function
#else

namespace fusedloss {

// Asynchronous on `stream`, which must belong to the current device.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Params... params) {
  if (shared_bytes > 48 << 10) {  // above this a kernel has to ask
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or else the next launch would report it once more
      return error;
    }
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params...);
  return cudaGetLastError();
}

}  // namespace fusedloss

#endif
