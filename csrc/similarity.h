// What a launch of the similarity GEMM is told: `Strip` and its mask mirror fusedloss/problem.py, the arguments of the
// epilogues those of kernels/. Plain data; a null pointer is what Python calls None. Every pointer is to device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace fusedloss {

constexpr int kMaxCompares = 4;  // of each kind in one mask
constexpr int kMaxExempt = 8;

// Columns stay where all that is given agrees.
struct Masks {
  const int64_t* drop_rows[kMaxCompares];  // [M]: columns of equal number are dropped
  const int64_t* drop_keys[kMaxCompares];  // [N]
  const int64_t* keep_rows[kMaxCompares];  // only columns of equal number are kept
  const int64_t* keep_keys[kMaxCompares];
  const uint8_t* dense;     // [M, N], 0 is dropped
  const int32_t* bits;      // [M, cdiv(N, 32)], 1 is dropped
  const float* threshold;   // [M]: larger similarities are dropped, but for
  const int64_t* exempt[kMaxExempt];  // [M] each, columns
  const int64_t* skip;      // [M]: the column that is dropped
  const int64_t* own;       // [M]: the column whose similarity
  const float* own_scale;   // multiplies instead
  int64_t stride_dm, stride_dn, stride_bm;
};

// z[i, j] = scale * row_factor[i] * col_factor[j] * <x_i, y_j> + bias[j], bent by a softcap
struct Strip {
  const void* x;  // [M, D]; one of its strides is 1
  const void* y;  // [N, D]; likewise
  void* out;      // [M, N], unit stride along N; in the operands' dtype, or null
  int M, N, D;
  int64_t stride_xm, stride_xd, stride_yn, stride_yd, stride_om;  // in elements
  const float* scale;       // 0-dim
  const float* row_factor;  // [M]
  const float* col_factor;  // [N]
  const float* bias;        // [N]; -inf removes a column
  float softcap;            // 0: none
  const int64_t* target;    // [M]: the column that the sums leave out; out of range: none
  bool tensor_cores;        // fp32 operands: rounded to tf32 for them
  Masks masks;
};

// Tables of partial sums have one line for every BLOCK_N columns, [cdiv(N, BLOCK_N), M], and by column one for every
// BLOCK_M rows, [cdiv(M, BLOCK_M), N]: without atomics they do not depend on the order in which tiles run.

// What is counted of a row's admissible negatives, a table each.
struct TallyArgs {
  const float* score;  // [M]: above it a logit ranks before the target's
  float *count, *above, *max, *z, *sim;
};

// Maxima and sums of exp(z - maximum); a maximum may be -inf, its sum is then 0.
struct StatsArgs {
  float *row_max, *row_sum;
  float *col_max, *col_sum;  // or null
  TallyArgs tally;
};

// E = exp(z - shift) and its sums.
struct ExpArgs {
  float shift;
  float* row_sum;
  float* col_sum;  // or null
  TallyArgs tally;
};

// dz = weight * exp(z - shift) per row, plus the same per column where col_shift is given. Stored is `gain * dz`, and
// `gain * entry` at the target. q receives row sums of dz (sim - target_sim), without the gain and the target.
struct GradArgs {
  const float* gain;  // 0-dim, or null
  const float *row_shift, *row_weight, *entry, *row_target_sim;  // [M]
  const float *col_shift, *col_weight, *col_target_sim;          // [N], or null
  float* q;
  const float* smooth;  // [M]: is taken from every admissible dz
};

struct TopArgs {
  float* top;  // the tile's largest logit, by row
  int64_t* column;  // where, the first on ties
};

struct PickArgs {
  float* picked;  // [M]: the similarity of the target
};

struct BitsArgs {
  const float* threshold;  // [M]
  int32_t* bits;           // [M, words]: 1 where a similarity exceeds the row's threshold
  int words;
};

struct StoreArgs {};  // the similarities themselves, in fp32 whatever the operands are

// Losses that are sums over a row's similarities v: positives are columns of equal label, or the target.
struct FoldArgs {
  const float* weight;  // [M], 0 leaves a row out
  const int64_t *row_labels, *key_labels;  // or null
  const int64_t* own;  // [M]: the column that is the row itself, neither positive nor negative; or null
  const float* target_value;  // [M]: margin_ranking's v at the target
  const float* sigmoid_bias;  // 0-dim
  float margin, sign;
  bool pulls;  // pair_hinge: over the positives
  float *loss, *count, *scale_grad, *bias_grad;  // tables by row, or null
};

// Losses of two log-sum-exps of a row: of f(v) over its positives, which it pulls, and over its negatives, which it
// pushes. linear: f(v) = pull (scale v - pull_base), push likewise. circle: f(v) = -gamma max(0, 1 + margin - v)
// (v - 1 + margin) and gamma max(0, v + margin) (v - margin).
struct SidesArgs {
  const int64_t *row_labels, *key_labels, *own;  // as FoldArgs'
  float pull, push, pull_base, push_base, margin, gamma;
  float *pull_max, *pull_sum, *push_max, *push_sum, *count;                   // stats: tables by row; the positives
  const float *pull_shift, *pull_weight, *push_shift, *push_weight;           // grad: [M]
  float* q;                                                                   // a table
};

// Which kernel runs a launch. BLOCK_M and BLOCK_N are the tables'.
struct Plan {
  int capability;  // 80 or 90: the kernel's, at most the device's
  int BLOCK_M, BLOCK_N;
  int cluster;  // 90: blocks along M that share what they load of y; 2 for bf16 and epilogues that are not narrow
  int blocks;   // 90: at most so many, which leaves multiprocessors to others; 0: one on each
};

// A pure function of what is asked: the device's capability (86, 90, ...; 0 on the host); whether products are the
// tensor cores'; whether both operands are row-major with rows that start at multiples of 16 bytes; and whether the
// epilogue is a narrow one: of fp32, general (masks, a softcap, a tally, smoothing), by columns and with q, top or a
// fold.
Plan plan(int capability, bool tensor_cores, bool aligned, bool narrow);

// Launches, asynchronous on `stream`, which must belong to the current device. Whatever they return but cudaSuccess,
// nothing was launched. T: float, fp16 or bf16.
template <class T>
struct Similarities {
  static cudaError_t stats(const Strip&, const StatsArgs&, const Plan&, cudaStream_t);
  static cudaError_t exp(const Strip&, const ExpArgs&, const Plan&, cudaStream_t);  // not fp16: it has not the range
  static cudaError_t grad(const Strip&, const GradArgs&, const Plan&, cudaStream_t);
  static cudaError_t top(const Strip&, const TopArgs&, const Plan&, cudaStream_t);
  static cudaError_t pick(const Strip&, const PickArgs&, const Plan&, cudaStream_t);
  static cudaError_t guide(const Strip&, const BitsArgs&, const Plan&, cudaStream_t);
  static cudaError_t store(const Strip&, const StoreArgs&, const Plan&, cudaStream_t);
  static cudaError_t sigmoid(const Strip&, const FoldArgs&, const Plan&, cudaStream_t);  // folds: not fp16
  static cudaError_t margin_ranking(const Strip&, const FoldArgs&, const Plan&, cudaStream_t);
  static cudaError_t pair_hinge(const Strip&, const FoldArgs&, const Plan&, cudaStream_t);
  static cudaError_t sides_stats(const Strip&, const SidesArgs&, const Plan&, cudaStream_t);
  static cudaError_t sides_grad(const Strip&, const SidesArgs&, const Plan&, cudaStream_t);
  static cudaError_t circle_stats(const Strip&, const SidesArgs&, const Plan&, cudaStream_t);
  static cudaError_t circle_grad(const Strip&, const SidesArgs&, const Plan&, cudaStream_t);
};

}  // namespace fusedloss
