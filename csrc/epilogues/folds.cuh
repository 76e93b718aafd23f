// Folds: sums over a row's similarities v, and their derivative by v, times the row's weight.
#pragma once

#include "logits.cuh"
#include "relations.cuh"
#include "sums.cuh"

namespace fusedloss {

enum class FoldKind { sigmoid, margin_ranking, pair_hinge };

// COLUMNS: pair_hinge of one matrix against itself. A tile has the sums of its columns as rows, where they have tables,
// and the derivative of both places.
template <FoldKind KIND, bool COLUMNS>
struct Fold {
  static_assert(!COLUMNS || KIND == FoldKind::pair_hinge, "the two places of a pair are alike");
  using Args = FoldArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : Visitor<S> {
    static constexpr bool STMATRIX = S::WARPGROUP && KIND != FoldKind::sigmoid;  // or else 16 bytes spill
    const Args& args;
    const Place<S>& place;
    typename S::Scratch& scratch;
    float scale, bias;
    float weight[S::ROWS], target_value[S::ROWS];
    Relations<S> relations;
    float loss[S::ROWS], count[S::ROWS], scale_grad[S::ROWS];  // count: sigmoid's bias_grad
    float col_weight[2], col_loss[8];
    uint32_t col_count[2];  // a byte a column, of at most 32 rows

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place, typename S::Scratch& scratch)
        : args(args), place(place), scratch(scratch), relations(args.row_labels, args.key_labels, args.own, place) {
      scale = ptx::load(strip.scale);
      bias = args.sigmoid_bias ? ptx::load(args.sigmoid_bias) : 0.0f;
      zero<S>(loss), zero<S>(count), zero<S>(scale_grad);
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        weight[i] = place.of_row(args.weight, i, 0.0f);
        target_value[i] = place.of_row(args.target_value, i, 0.0f);
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) {
#pragma unroll
      for (int e = 0; COLUMNS && e < 2; ++e) {
        col_weight[e] = place.of_col(args.col_weight, j + e, 0.0f);
        col_loss[j % 8 + e] = 0;
        if (j % 8 == 0) col_count[e] = 0;
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const float v = element.sim;
      const bool positive = relations.positive(i, j, element.target);
      const bool counts = relations.template counts<INNER>(i, j, place);
      if constexpr (KIND == FoldKind::sigmoid) {
        // log(1 + exp(-y z)), y = 1 for positives and -1 for negatives
        const float z = v * scale + bias, u = positive ? -z : z;
        const float e = exponential(-fabsf(u));
        const float p = (u < 0 ? e : 1.0f) * ptx::reciprocal(1 + e);
        const bool in = counts && weight[i] != 0;
        const float dz = in ? weight[i] * (positive ? -p : p) : 0.0f;
        loss[i] += in ? maximum(u, 0.0f) + log1p(e) : 0.0f;
        count[i] += dz;
        scale_grad[i] += in ? dz * v : 0.0f;
        return dz * scale;
      } else {
        // max(0, margin - v_t + v) of the negatives; max(0, sign (v - margin)) of the positives or the negatives
        const bool ranking = KIND == FoldKind::margin_ranking;
        const float hinge = ranking ? v - target_value[i] + args.margin : args.sign * (v - args.margin);
        const bool pays = counts && (ranking ? !element.target : positive == args.pulls) && !(hinge <= 0);
        loss[i] += pays ? hinge : 0.0f;
        count[i] += pays ? 1.0f : 0.0f;
        if constexpr (COLUMNS) {
          const bool there = pays && place.has_row(i);
          col_loss[j % 8] += there ? hinge : 0.0f;
          col_count[j % 8 / 4] += uint32_t(there) << (8 * (j % 4));
          return pays ? (weight[i] + col_weight[j % 2]) * args.sign : 0.0f;
        }
        return pays ? (ranking ? weight[i] : weight[i] * args.sign) : 0.0f;
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void group(int k) {
      if constexpr (COLUMNS) {
        scratch.col[0][place.warp_m][group_column(place, k)] = over_rows<Sum>(col_loss, place.g);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          for (uint32_t& word : col_count) word += ptx::shuffle_xor(word, lanes);
        }
        const uint32_t word = place.g < 4 ? col_count[0] : col_count[1];
        scratch.col[1][place.warp_m][group_column(place, k)] = float(word >> (8 * (place.g % 4)) & 0xff);
      }
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place, scratch);
    for_each_logit<false, Out, KIND == FoldKind::sigmoid>(acc, strip, place, scratch, visit);
    rows_to_table<Sum>(visit.loss, args.loss, place, scratch);
    rows_to_table<Sum>(visit.count, KIND == FoldKind::sigmoid ? args.bias_grad : args.count, place, scratch);
    if constexpr (KIND == FoldKind::sigmoid) rows_to_table<Sum>(visit.scale_grad, args.scale_grad, place, scratch);
    if constexpr (COLUMNS) {
      if (args.col_loss) columns_to_table<false>(args.col_loss, args.col_count, place, scratch);
    }
  }
};

}  // namespace fusedloss
