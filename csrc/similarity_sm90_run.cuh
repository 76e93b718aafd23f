// run_sm90 of all epilogues. similarity_sm90_*.cu compile one number format each.
#pragma once

#include <algorithm>

#include "similarity.cuh"
#include "similarity_sm90.cuh"

namespace fusedloss {

template <class T, class Epilogue>
cudaError_t run_sm90(const Strip& strip, const typename Epilogue::Args& args, const Plan& plan, cudaStream_t stream) {
  // fp32 is stored 8 bytes at a time: exp would spill 56.
  constexpr int BLOCK_N = Epilogue::NARROW || sizeof(T) == 4 ? 128 : 256;
  if (plan.BLOCK_N != BLOCK_N) return cudaErrorInvalidValue;  // the tables were made for another kernel
  if (strip.M == 0 || strip.N == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  if (plan.blocks > 0) multiprocessors = std::min(multiprocessors, plan.blocks);
  // Which of the two is faster no GPU has said yet: docs/performance-notes.md.
  if constexpr (std::is_same_v<T, bf16> && !Epilogue::NARROW) {
    if (plan.cluster == 2) return launch_sm90<T, Epilogue, BLOCK_N, 2>(strip, args, multiprocessors, stream);
  }
  if (plan.cluster != 1) return cudaErrorNotSupported;
  return launch_sm90<T, Epilogue, BLOCK_N>(strip, args, multiprocessors, stream);
}

}  // namespace fusedloss

#define FUSEDLOSS_RUN_SM90(T, ...)                                                                          \
  template cudaError_t fusedloss::run_sm90<T, __VA_ARGS__>(const Strip&, const typename __VA_ARGS__::Args&, \
                                                           const Plan&, cudaStream_t);
