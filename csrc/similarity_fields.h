// What the launches of similarity.h are told, read as fields_end.h says: `Strip` and its mask mirror
// fusedloss/core/strips.py, the arguments of the epilogues those of kernels/.
#ifndef SIZE
#define SIZE(type, name) FIELD(type, name)
#endif

// Columns stay where all that is given agrees.
STRUCT(Masks)
FIELD(Pointers<kMaxCompares>, drop_rows)  // [M]: columns of equal number are dropped
FIELD(Pointers<kMaxCompares>, drop_keys)  // [N]
FIELD(Pointers<kMaxCompares>, keep_rows)  // only columns of equal number are kept
FIELD(Pointers<kMaxCompares>, keep_keys)
FIELD(const uint8_t*, dense)          // [M, N], 0 is dropped
FIELD(const int32_t*, bits)           // [M, cdiv(N, 32)], 1 is dropped
FIELD(const float*, threshold)        // [M]: larger similarities are dropped, but for
FIELD(Pointers<kMaxExempt>, exempt)   // [M] each, columns
FIELD(const int64_t*, skip)           // [M]: the column that is dropped
FIELD(const int64_t*, own)            // [M]: the column whose similarity
FIELD(const float*, own_scale)        // multiplies instead
FIELD(int64_t, stride_dm)
FIELD(int64_t, stride_dn)
FIELD(int64_t, stride_bm)
END

// z[i, j] = scale * row_factor[i] * col_factor[j] * <x_i, y_j> + bias[j], bent by a softcap
STRUCT(Strip)
FIELD(const void*, x)  // [M, D]; one of its strides is 1
FIELD(const void*, y)  // [N, D]; likewise
FIELD(void*, out)      // [M, N], unit stride along N; in the operands' dtype, or null
SIZE(int, M)
SIZE(int, N)
SIZE(int, D)
FIELD(int64_t, stride_xm)  // in elements
FIELD(int64_t, stride_xd)
FIELD(int64_t, stride_yn)
FIELD(int64_t, stride_yd)
FIELD(int64_t, stride_om)
FIELD(const float*, scale)       // 0-dim
FIELD(const float*, row_factor)  // [M]
FIELD(const float*, col_factor)  // [N]
FIELD(const float*, bias)        // [N]; -inf removes a column
FIELD(float, softcap)            // 0: none
FIELD(const int64_t*, target)    // [M]: the column that the sums leave out; out of range: none
FIELD(bool, tensor_cores)        // fp32 operands: rounded to tf32 for them
FIELD(Masks, masks)
END

// Tables of partial sums have one line for every BLOCK_N columns, [cdiv(N, BLOCK_N), M], and by column one for every
// BLOCK_M rows, [cdiv(M, BLOCK_M), N]: without atomics they do not depend on the order in which tiles run.

// What is counted of a row's admissible negatives, a table each.
STRUCT(TallyArgs)
FIELD(const float*, score)  // [M]: above it a logit ranks before the target's
FIELD(float*, count)
FIELD(float*, above)
FIELD(float*, max)
FIELD(float*, z)
FIELD(float*, sim)
END

// Maxima and sums of exp(z - maximum); a maximum may be -inf, its sum is then 0.
STRUCT(StatsArgs)
FIELD(float*, row_max)
FIELD(float*, row_sum)
FIELD(float*, col_max)  // both or null
FIELD(float*, col_sum)
FIELD(TallyArgs, tally)
END
LAUNCH(stats, StatsArgs)

// E = exp(z - shift) and its sums. Not for fp16, which has not the range.
STRUCT(ExpArgs)
FIELD(float, shift)
FIELD(float*, row_sum)
FIELD(float*, col_sum)  // or null
FIELD(TallyArgs, tally)
END
LAUNCH(exp, ExpArgs)

// dz = weight * exp(z - shift) per row, plus the same per column where col_shift is given. Stored is `gain * dz`, and
// `gain * entry` at the target. q receives row sums of dz (sim - target_sim), without the gain and the target.
STRUCT(GradArgs)
FIELD(const float*, gain)            // 0-dim, or null
FIELD(const float*, row_shift)       // [M]
FIELD(const float*, row_weight)      // [M]
FIELD(const float*, entry)           // [M]
FIELD(const float*, row_target_sim)  // [M]
FIELD(const float*, col_shift)       // [N], or null
FIELD(const float*, col_weight)      // [N], or null
FIELD(const float*, col_target_sim)  // [N], or null
FIELD(float*, q)
FIELD(const float*, smooth)          // [M]: is taken from every admissible dz
END
LAUNCH(grad, GradArgs)

STRUCT(TopArgs)
FIELD(float*, top)       // the tile's largest logit, by row
FIELD(int64_t*, column)  // where, the first on ties
END
LAUNCH(top, TopArgs)

// Of one matrix against itself, by labels: the largest z of another label, and the largest -z of the own one. Tables by
// row, and by column of the columns as rows, all or null; the places are the first on ties.
STRUCT(OpposedArgs)
FIELD(const int64_t*, row_labels)  // [M]
FIELD(const int64_t*, key_labels)  // [N]
FIELD(const int64_t*, own)         // [M]: the column that is the row itself, or null
FIELD(const float*, row_bias)      // [M], or null; added to z of the columns as rows
FIELD(const float*, col_bias)      // [N], or null; added to z of the rows
FIELD(float*, other)
FIELD(int64_t*, other_column)
FIELD(float*, alike)
FIELD(int64_t*, alike_column)
FIELD(float*, col_other)
FIELD(int64_t*, col_other_row)
FIELD(float*, col_alike)
FIELD(int64_t*, col_alike_row)
END
LAUNCH(opposed, OpposedArgs)

STRUCT(PickArgs)
FIELD(float*, picked)  // [M]: the similarity of the target
END
LAUNCH(pick, PickArgs)

STRUCT(BitsArgs)
FIELD(const float*, threshold)  // [M]
FIELD(int32_t*, bits)           // [M, words]: 1 where a similarity exceeds the row's threshold
FIELD(int, words)
END
LAUNCH(guide, BitsArgs)

STRUCT(StoreArgs)  // the similarities themselves, in fp32 whatever the operands are
END
LAUNCH(store, StoreArgs)

// Losses that are sums over a row's similarities v: positives are columns of equal label, or the target. These and the
// following are not for fp16. What begins with col is of the columns as rows, of one matrix against itself: a tile then
// stands for both places of its pairs.
STRUCT(FoldArgs)
FIELD(const float*, weight)        // [M], 0 leaves a row out
FIELD(const int64_t*, row_labels)  // [M], or null
FIELD(const int64_t*, key_labels)  // [N], or null
FIELD(const int64_t*, own)         // [M]: the column that is the row itself, neither positive nor negative; or null
FIELD(const float*, target_value)  // [M]: margin_ranking's v at the target
FIELD(const float*, sigmoid_bias)  // 0-dim
FIELD(float, margin)
FIELD(float, sign)
FIELD(bool, pulls)                 // pair_hinge: over the positives
FIELD(float*, loss)                // tables by row, or null
FIELD(float*, count)
FIELD(float*, scale_grad)
FIELD(float*, bias_grad)
FIELD(const float*, col_weight)    // [N]: pair_hinge's; or null
FIELD(float*, col_loss)            // tables by column, both or null
FIELD(float*, col_count)
END
LAUNCH(sigmoid, FoldArgs)
LAUNCH(margin_ranking, FoldArgs)
LAUNCH(pair_hinge, FoldArgs)

// Losses of two log-sum-exps of a row: of f(v) over its positives, which it pulls, and over its negatives, which it
// pushes. linear: f(v) = pull (scale v - pull_base), push likewise. circle: f(v) = -gamma max(0, 1 + margin - v)
// (v - 1 + margin) and gamma max(0, v + margin) (v - margin).
STRUCT(SidesArgs)
FIELD(const int64_t*, row_labels)  // as FoldArgs'
FIELD(const int64_t*, key_labels)
FIELD(const int64_t*, own)
FIELD(float, pull)
FIELD(float, push)
FIELD(float, pull_base)
FIELD(float, push_base)
FIELD(float, margin)
FIELD(float, gamma)
FIELD(float*, pull_max)            // statistics: tables by row
FIELD(float*, pull_sum)
FIELD(float*, push_max)
FIELD(float*, push_sum)
FIELD(float*, count)               // of the positives; or null
FIELD(float*, col_pull_max)        // tables by column, all or null
FIELD(float*, col_pull_sum)
FIELD(float*, col_push_max)
FIELD(float*, col_push_sum)
FIELD(const float*, pull_shift)    // gradient: [M] each
FIELD(const float*, pull_weight)
FIELD(const float*, push_shift)
FIELD(const float*, push_weight)
FIELD(const float*, col_pull_shift)  // [N] each, all or null
FIELD(const float*, col_pull_weight)
FIELD(const float*, col_push_shift)
FIELD(const float*, col_push_weight)
FIELD(float*, q)                   // a table, or null
END
LAUNCH(sides_stats, SidesArgs)
LAUNCH(sides_grad, SidesArgs)
LAUNCH(circle_stats, SidesArgs)
LAUNCH(circle_grad, SidesArgs)
