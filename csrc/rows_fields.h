// What the launches of rows.h are told, and their formulas. Read as fields_end.h says.
#ifndef SIZE
#define SIZE(type, name) FIELD(type, name)
#endif

// row_factor_i = 1 / |x_i|, col_factor_j = 1 / |y_j|, and with t = target_i
// target_sim_i = row_factor_i col_factor_t <x_i, y_t>, under its margin times `scale`, plus bias_t, bent: the score.
// A target of -1 has the similarity 0. The norms of y alone: x and score are null.
STRUCT(PrepareParams)
FIELD(const void*, x)          // [M, D]
FIELD(const void*, y)          // [N, D]
FIELD(DType, dtype)            // of both
FIELD(const int64_t*, target)  // [M]
FIELD(const float*, scale)     // 0-dim
FIELD(const float*, bias)      // [N]
FIELD(float*, row_factor)      // [M], or null: neither side is divided by its norm
FIELD(float*, col_factor)      // [N], or null: nobody asks for them
FIELD(double*, score)          // [M]: the target's logit
FIELD(float*, target_sim)      // [M]
FIELD(float*, slope)           // [M]: of the score by its scale * sim, where there is a margin or a softcap
SIZE(int64_t, M)
SIZE(int64_t, N)
SIZE(int64_t, D)
FIELD(int64_t, stride_xm)      // any strides; 16 bytes at a time where rows allow it
FIELD(int64_t, stride_xd, 1)
FIELD(int64_t, stride_yn)
FIELD(int64_t, stride_yd, 1)
FIELD(double, softcap)         // 0: none. Numbers that scores depend on: not rounded to fp32
FIELD(double, margin_angle)    // `Margin` of fusedloss/core/problem.py; both 0: none
FIELD(double, margin_cosine)
END
LAUNCH(prepare, PrepareParams)

// Folds a table of partial sums, each total * exp(max), into the running ones. A maximum may be -inf.
STRUCT(MergeParams)
FIELD(const float*, max)    // [n_tiles, R]
FIELD(const float*, sum)    // [n_tiles, R]
FIELD(float*, running_max)  // [R]: in place; 0 for an empty sum is as good as -inf
FIELD(float*, running_sum)  // [R]
SIZE(int64_t, n_tiles)
SIZE(int64_t, R)
END
LAUNCH(merge, MergeParams)

// From partial sums of the negatives to the loss, weight / l and the target's entry in the gradient:
// l = total + copies exp(score - shift), loss = weight log(l exp(shift - score)), entry = -over_l total, and more of
// each where there is smoothing or a z-loss: see fusedloss/core/rows.py. Rows of weight 0 have zeros.
STRUCT(SettleParams)
FIELD(const float*, max)     // [n_tiles, R], or null: all sums are relative to exp(shift)
FIELD(const float*, sum)     // [n_tiles, R]
FIELD(float, shift)
FIELD(const double*, score)  // [R]: the target's logit
FIELD(const float*, weight)  // [R]
FIELD(float, label_smoothing)
FIELD(float, copies, 1)      // how often the target stands in l
FIELD(float, z_loss)
FIELD(bool, decoupled)       // the target stays out of l
FIELD(const float*, smooth)  // [R]: what smoothing takes from every admissible entry
FIELD(const float*, slope)   // [R]: what the target's entry is times
FIELD(float*, row_shift)     // [R] each; outputs may be null
FIELD(float*, over_l)        // weight / l
FIELD(float*, entry)
FIELD(float*, loss)
// The workspace whose target entries are patched: out[i, target_i] = entry_i row_factor_i col_factor_t. Entries, also
// those above, are then relative to over_l.
FIELD(void*, out)  // [R, N], unit stride along N
FIELD(DType, out_dtype)
FIELD(const int64_t*, target)    // [R]; negative: none
FIELD(const float*, row_factor)  // [R], or null like
FIELD(const float*, col_factor)  // [N]
FIELD(int64_t, stride_om)
SIZE(int64_t, n_tiles)
SIZE(int64_t, R)
END
LAUNCH(settle, SettleParams)

// out[m, d] = cast(input[m, d] * row_factor[m] * scalar[0])
//
// This is how operands are multiplied by weight / l, and how a gradient leaves the sweep: rounded once, after the
// factors that depend on the row and on the loss (upstream gradient / denominator).
STRUCT(ScaleRowsParams)
FIELD(const void*, input)        // [M, D]
FIELD(void*, out)                // [M, D], unit stride along D; may be `input` itself when dtype and strides agree
FIELD(DType, in_dtype)
FIELD(DType, out_dtype)
FIELD(const float*, row_factor)  // [M], or null for 1
FIELD(const float*, scalar)      // [1] on the device, so that the host need not wait for it; or null for 1
SIZE(int64_t, M)
SIZE(int64_t, D)
FIELD(int64_t, in_stride)
FIELD(int64_t, in_stride_d, 1)
FIELD(int64_t, out_stride)
END
LAUNCH(scale_rows, ScaleRowsParams)

// dz = E (row_weight_i + col_weight_j) in place, where E was stored, times both factors, until both normalisers were
// known; entry_i row_factor_i col_factor_t at the target.
STRUCT(WeighParams)
FIELD(void*, out)  // [R, N], unit stride along N
FIELD(DType, dtype)
FIELD(const float*, row_weight)  // [R]
FIELD(const float*, col_weight)  // [N]
FIELD(const float*, entry)       // [R]
FIELD(const int64_t*, target)    // [R]; negative: none
FIELD(const float*, row_factor)  // [R], or null like
FIELD(const float*, col_factor)  // [N]
SIZE(int64_t, R)
SIZE(int64_t, N)
FIELD(int64_t, stride_om)
END
LAUNCH(weigh, WeighParams)

// What the products left out: out = cast(dx - factor^2 <dx, x> x), dx = scale / gain * over_l * total.
STRUCT(FinishParams)
FIELD(const float*, total)   // [R, D], unit stride along D
FIELD(const float*, over_l)  // [R]
FIELD(const float*, scale)   // 0-dim
FIELD(const float*, gain)    // 0-dim
FIELD(const void*, x)        // [R, D], or null: no norms, no projection
FIELD(const float*, factor)  // [R]: 1 / |x_i|
FIELD(void*, out)            // [R, D], unit stride along D; may be `total` when dtype and strides agree
FIELD(DType, x_dtype)
FIELD(DType, out_dtype)
SIZE(int64_t, R)
SIZE(int64_t, D)
FIELD(int64_t, stride_tm)
FIELD(int64_t, stride_xm)
FIELD(int64_t, stride_xd, 1)
FIELD(int64_t, stride_om)
END
LAUNCH(finish, FinishParams)
