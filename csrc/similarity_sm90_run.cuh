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
  if constexpr (BLOCK_N == 256) {
    // A cluster of two fetches two thirds from L2, and multiplies zeros where the last row tile is a single one.
    const int row_tiles = (strip.M - 1) / 128 + 1;
    const bool pairs = (row_tiles % 2 == 0 || row_tiles >= 8) && multiprocessors > 1;
    if (plan.cluster == 2 || (plan.cluster == 0 && pairs)) {
      return launch_sm90<T, Epilogue, BLOCK_N, 2>(strip, args, multiprocessors, stream);
    }
  }
  if (plan.cluster > 1) return cudaErrorNotSupported;
  return launch_sm90<T, Epilogue, BLOCK_N>(strip, args, multiprocessors, stream);
}

}  // namespace fusedloss

#define FUSEDLOSS_RUN_SM90(T, ...)                                                                          \
  template cudaError_t fusedloss::run_sm90<T, __VA_ARGS__>(const Strip&, const typename __VA_ARGS__::Args&, \
                                                           const Plan&, cudaStream_t);
