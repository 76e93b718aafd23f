// What happens once per row, beside the similarity GEMM: fusedloss/rows.py is the definition, kernels/rows.py the same
// in Triton. Free of torch: plain data, pointers to device memory and a stream. A null pointer is what Python calls
// None. Vectors are contiguous; strides are in elements.
//
// All sizes may be 0, all alignments are served. Asynchronous on `stream`, which must belong to the current device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace fusedloss {

// row_factor_i = 1 / |x_i|, col_factor_j = 1 / |y_j|, and with t = target_i
// target_sim_i = row_factor_i col_factor_t <x_i, y_t>, under its margin times `scale`, plus bias_t, bent: the score.
// A target of -1 has the similarity 0. The norms of y alone: x and score are null.
struct PrepareParams {
  const void* x;          // [M, D]
  const void* y;          // [N, D]
  DType dtype;            // of both
  const int64_t* target;  // [M]
  const float* scale;     // 0-dim
  const float* bias;      // [N]
  float* row_factor;      // [M], or null: neither side is divided by its norm
  float* col_factor;      // [N], or null: nobody asks for them
  double* score;          // [M]: the target's logit
  float* target_sim;      // [M]
  float* slope;           // [M]: of the score by its scale * sim, where there is a margin or a softcap
  int64_t M, N, D;
  int64_t stride_xm, stride_xd = 1, stride_yn, stride_yd = 1;  // any; 16 bytes at a time where rows allow it
  double softcap;                      // 0: none. Numbers that scores depend on: not rounded to fp32
  double margin_angle, margin_cosine;  // `Margin` of fusedloss/problem.py; both 0: none
};
cudaError_t prepare(const PrepareParams& params, cudaStream_t stream);

// Folds a table of partial sums, each total * exp(max), into the running ones. A maximum may be -inf.
struct MergeParams {
  const float* max;  // [n_tiles, R]
  const float* sum;
  float* running_max;  // [R]: in place; 0 for an empty sum is as good as -inf
  float* running_sum;
  int64_t n_tiles, R;
};
cudaError_t merge(const MergeParams& params, cudaStream_t stream);

// From partial sums of the negatives to the loss, weight / l and the target's entry in the gradient:
// l = total + copies exp(score - shift), loss = weight log(l exp(shift - score)), entry = -over_l total, and more of
// each where there is smoothing or a z-loss: see fusedloss/rows.py. Rows of weight 0 have zeros.
struct SettleParams {
  const float* max;     // [n_tiles, R], or null: all sums are relative to exp(shift)
  const float* sum;     // [n_tiles, R]
  float shift;
  const double* score;  // [R]: the target's logit
  const float* weight;  // [R]
  float label_smoothing;
  float copies = 1;     // how often the target stands in l
  float z_loss;
  bool decoupled;       // the target stays out of l
  const float* smooth;  // [R]: what smoothing takes from every admissible entry
  const float* slope;   // [R]: what the target's entry is times
  float* row_shift;     // [R] each; outputs may be null
  float* over_l;        // weight / l
  float* entry;
  float* loss;
  // The workspace whose target entries are patched: out[i, target_i] = entry_i row_factor_i col_factor_t. Entries, also
  // those above, are then relative to over_l.
  void* out;  // [R, N], unit stride along N
  DType out_dtype;
  const int64_t* target;    // [R]; negative: none
  const float* row_factor;  // [R], or null like
  const float* col_factor;  // [N]
  int64_t stride_om;
  int64_t n_tiles, R;
};
cudaError_t settle(const SettleParams& params, cudaStream_t stream);

// out[m, d] = cast(input[m, d] * row_factor[m] * scalar[0])
//
// This is how operands are multiplied by weight / l, and how a gradient leaves the sweep: rounded once, after the
// factors that depend on the row and on the loss (upstream gradient / denominator).
struct ScaleRowsParams {
  const void* input;        // [M, D]
  void* out;                // [M, D], unit stride along D; may be `input` itself when dtype and strides agree
  DType in_dtype, out_dtype;
  const float* row_factor;  // [M], or null for 1
  const float* scalar;      // [1] on the device, so that the host need not wait for it; or null for 1
  int64_t M, D;
  int64_t in_stride, in_stride_d = 1, out_stride;
};
cudaError_t scale_rows(const ScaleRowsParams& params, cudaStream_t stream);

// dz = E (row_weight_i + col_weight_j) in place, where E was stored, times both factors, until both normalisers were
// known; entry_i row_factor_i col_factor_t at the target.
struct WeighParams {
  void* out;  // [R, N], unit stride along N
  DType dtype;
  const float* row_weight;  // [R]
  const float* col_weight;  // [N]
  const float* entry;       // [R]
  const int64_t* target;    // [R]; negative: none
  const float* row_factor;  // [R], or null like
  const float* col_factor;  // [N]
  int64_t R, N;
  int64_t stride_om;
};
cudaError_t weigh(const WeighParams& params, cudaStream_t stream);

// What the products left out: out = cast(dx - factor^2 <dx, x> x), dx = scale / gain * over_l * total.
struct FinishParams {
  const float* total;   // [R, D], unit stride along D
  const float* over_l;  // [R]
  const float* scale;   // 0-dim
  const float* gain;    // 0-dim
  const void* x;        // [R, D], or null: no norms, no projection
  const float* factor;  // [R]: 1 / |x_i|
  void* out;            // [R, D], unit stride along D; may be `total` when dtype and strides agree
  DType x_dtype, out_dtype;
  int64_t R, D;
  int64_t stride_tm, stride_xm, stride_xd = 1, stride_om;
};
cudaError_t finish(const FinishParams& params, cudaStream_t stream);

}  // namespace fusedloss
