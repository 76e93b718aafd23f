// Work on the rows of a matrix. Free of torch: plain pointers to device memory, sizes and a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedloss {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// out[m, d] = cast(in[m, d] * row_factor[m] * scalar[0])
//
// This is how a gradient leaves the sweep: rounded once, after the factors that depend on the row (a norm) and on the
// loss (upstream gradient / denominator).
struct ScaleRowsParams {
  const float* in;          // [M, D], rows in_stride elements apart
  void* out;                // [M, D], rows out_stride elements apart; may be `in` itself when the dtype and strides agree
  const float* row_factor;  // [M], or null for 1
  const float* scalar;      // [1] on the device, so that the host need not wait for it; or null for 1
  int64_t M, D;
  int64_t in_stride, out_stride;
  DType out_dtype;
};

// Any M, D >= 0 and any alignment. Asynchronous on `stream`, which must belong to the current device.
cudaError_t scale_rows(const ScaleRowsParams& params, cudaStream_t stream);

}  // namespace fusedloss
