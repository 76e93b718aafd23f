// Losses of two log-sum-exps of a row: of its positives' f(v), and of its negatives'.
#pragma once

#include "logits.cuh"
#include "relations.cuh"
#include "sums.cuh"

namespace fusedloss {

enum class SideKind { linear, circle };

// f(v) and its slope. circle's weights are constants to the gradient.
template <SideKind KIND>
FUSEDLOSS_INLINE float side(const SidesArgs& args, bool positive, float v, float scale, float& slope) {
  if constexpr (KIND == SideKind::linear) {
    slope = (positive ? args.pull : args.push) * scale;
    const float pull = args.pull * (v * scale) - args.pull * args.pull_base;
    const float push = args.push * (v * scale) - args.push * args.push_base;
    return positive ? pull : push;
  } else {
    const float u = positive ? 1 - v : v, weight = args.gamma * maximum(u + args.margin, 0.0f);
    slope = positive ? -weight : weight;
    return weight * (u - args.margin);
  }
}

template <class S>
struct SidesVisitor : Visitor<S> {
  const SidesArgs& args;
  const Place<S>& place;
  Relations<S> relations;
  float scale;

  FUSEDLOSS_INLINE SidesVisitor(const SidesArgs& args, const Strip& strip, const Place<S>& place)
      : args(args), place(place), relations(args.row_labels, args.key_labels, args.own, place) {
    scale = ptx::load(strip.scale);
  }
};

// Maxima of f and sums of exp(f - maximum), of each side. COLUMNS, here and below: of one matrix against itself, where
// a pair has one f and one side in both of its places; a tile has the sums of its columns as rows, too.
template <SideKind KIND, bool COLUMNS>
struct SidesStats {
  using Args = SidesArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : SidesVisitor<S> {
    float count[S::ROWS];  // of positives

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place)
        : SidesVisitor<S>(args, strip, place) {
      zero<S>(count);
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const bool positive = this->relations.positive(i, j, element.target);
      const bool there = !COLUMNS || this->place.has_row(i);
      const bool counts = there && this->relations.template counts<INNER>(i, j, this->place);
      float slope;
      const float f = side<KIND>(this->args, positive, element.sim, this->scale, slope);
      count[i] += counts && positive ? 1.0f : 0.0f;
      return counts ? f : -kInf;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place);
    for_each_logit<false, void, false>(acc, strip, place, scratch, visit);
    float max[2][S::ROWS], sum[2][S::ROWS];  // negatives, positives
    int target[S::ROWS] = {};
    const auto positive = [&](int i, int j) {
      return visit.relations.positive(i, j, target[i] == Place<S>::offset(j));
    };
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      ptx::sync_warp();  // a row after the other, as in walk
      // From itself to itself: what ptxas knows of these it would keep, 64 predicates in registers, and spill.
      target[i] = ptx::shuffle_xor(place.hit(strip.target, i), 0);
#pragma unroll
      for (int w = 0; w < Bits<S>::WORDS; ++w) {
        uint32_t& word = visit.relations.alike.word[i][w];
        word = ptx::shuffle_xor(word, 0);
      }
      max[0][i] = max[1][i] = -kInf;
#pragma unroll
      for (int j = 0; j < S::COLUMNS; ++j) {
        const float f = at<S>(acc, i, j);
        max[0][i] = maximum(max[0][i], positive(i, j) ? -kInf : f);
        max[1][i] = maximum(max[1][i], positive(i, j) ? f : -kInf);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) max[k][i] = over_quad<Max>(max[k][i]), sum[k][i] = 0;
      const float push = finite(max[0][i]), pull = finite(max[1][i]);
#pragma unroll
      for (int j = 0; j < S::COLUMNS; ++j) {
        const float e = exponential(at<S>(acc, i, j) - (positive(i, j) ? pull : push));
        sum[0][i] += positive(i, j) ? 0.0f : e;
        sum[1][i] += positive(i, j) ? e : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) sum[k][i] = over_quad<Sum>(sum[k][i]);
    }
    maxima_to_table(max[0], sum[0], args.push_max, args.push_sum, place, scratch);
    maxima_to_table(max[1], sum[1], args.pull_max, args.pull_sum, place, scratch);
    if constexpr (COLUMNS) {
      columns<false>(acc, positive, args.col_push_max, args.col_push_sum, place, scratch);
      columns<true>(acc, positive, args.col_pull_max, args.col_pull_sum, place, scratch);
    } else {
      if (args.count) rows_to_table<Sum>(visit.count, args.count, place, scratch);
    }
  }

  // A side at a time: both would take twice the registers and the scratch, and save an exponential of -inf.
  template <bool PULL, class S, class Positive>
  static FUSEDLOSS_INLINE void columns(float (&acc)[S::MT][S::NT][4], const Positive& positive, float* max_table,
                                       float* sum_table, const Place<S>& place, typename S::Scratch& scratch) {
#pragma unroll
    for (int k = 0; k < S::NT / kGroup; ++k) {
      float max[8], sum[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float f[S::ROWS];
        max[j] = -kInf, sum[j] = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          f[i] = positive(i, 8 * k + j) == PULL ? at<S>(acc, i, 8 * k + j) : -kInf;
          max[j] = maximum(max[j], f[i]);
        }
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) sum[j] += exponential(f[i] - finite(max[j]));
      }
      merge_over_rows(max, sum, place.g);
      scratch.col[0][place.warp_m][group_column(place, k)] = max[0];
      scratch.col[1][place.warp_m][group_column(place, k)] = sum[0];
    }
    columns_to_table<true>(max_table, sum_table, place, scratch);
  }
};

// weight * exp(f - shift) * slope of each side, where the weights hold the loss's derivative by the side's log-sum-exp
// over the side's sum. q: row sums of what is before the slope, times v. COLUMNS: both places' of each pair.
template <SideKind KIND, bool COLUMNS>
struct SidesGrad {
  using Args = SidesArgs;
  static constexpr bool NARROW = true;

  // Of the thread's columns, as in Grad: pushes, then pulls.
  template <class S>
  struct Ahead : Factors<S> {
    using Factors<S>::EACH, Factors<S>::column;
    float weight[2][EACH], shift[2][EACH];

    FUSEDLOSS_INLINE Ahead(const Strip& strip, const Args& args, const Place<S>& place) : Factors<S>(strip, place) {
#pragma unroll
      for (int e = 0; COLUMNS && e < 2 * EACH; ++e) {
        const int k = e % 2, col = column(place, e / 2);
        weight[k][e / 2] = place.of_local_col(k ? args.col_pull_weight : args.col_push_weight, col, 0.0f);
        const float* const shifts = k ? args.col_pull_shift : args.col_push_shift;
        shift[k][e / 2] = weight[k][e / 2] == 0 ? kInf : place.of_local_col(shifts, col, kInf);
      }
    }
    FUSEDLOSS_INLINE void lay(const Place<S>& place, typename S::Scratch& scratch) const {
      Factors<S>::lay(place, scratch);
#pragma unroll
      for (int e = 0; COLUMNS && e < 2 * EACH; ++e) {
        const int k = e % 2, col = column(place, e / 2);
        scratch.col[k][0][col] = weight[k][e / 2];
        scratch.col[k][1][col] = shift[k][e / 2];
      }
    }
  };

  template <class S>
  struct Visit : SidesVisitor<S> {
    typename S::Scratch& scratch;
    float shift[2][S::ROWS], weight[2][S::ROWS], q[S::ROWS];
    float col_shift[2][2], col_weight[2][2];  // of each side

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place, typename S::Scratch& scratch)
        : SidesVisitor<S>(args, strip, place), scratch(scratch) {
      zero<S>(q);
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          weight[k][i] = place.of_row(k ? args.pull_weight : args.push_weight, i, 0.0f);
          // A weight of 0 gets shift +inf, because 0 * exp(f - shift) may be NaN.
          shift[k][i] = weight[k][i] == 0 ? kInf : place.of_row(k ? args.pull_shift : args.push_shift, i, kInf);
        }
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) {
#pragma unroll
      for (int k = 0; COLUMNS && k < 2; ++k) {
        if constexpr (S::WARPGROUP) {
          const Pair weights = pair_at(scratch.col[k][0], j, this->place);
          const Pair shifts = pair_at(scratch.col[k][1], j, this->place);
#pragma unroll
          for (int e = 0; e < 2; ++e) col_weight[k][e] = weights.x[e], col_shift[k][e] = shifts.x[e];
        } else {
          const float* const weights = k ? this->args.col_pull_weight : this->args.col_push_weight;
          const float* const shifts = k ? this->args.col_pull_shift : this->args.col_push_shift;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            col_weight[k][e] = this->place.of_col(weights, j + e, 0.0f);
            col_shift[k][e] = col_weight[k][e] == 0 ? kInf : this->place.of_col(shifts, j + e, kInf);
          }
        }
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const bool positive = this->relations.positive(i, j, element.target);
      float slope;
      const float f = side<KIND>(this->args, positive, element.sim, this->scale, slope);
      const float own = positive ? weight[1][i] : weight[0][i];
      float d = own * exponential(f - (positive ? shift[1][i] : shift[0][i]));
      bool taken = own != 0;
      if constexpr (COLUMNS) {
        const float other = positive ? col_weight[1][j % 2] : col_weight[0][j % 2];
        d += other * exponential(f - (positive ? col_shift[1][j % 2] : col_shift[0][j % 2]));
        taken |= other != 0;
      }
      const bool counts = this->relations.template counts<INNER>(i, j, this->place) && taken;
      d = counts ? d : 0.0f;
      q[i] += counts ? d * element.sim : 0.0f;
      return counts ? d * slope : 0.0f;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place, scratch);
    for_each_logit<false, Out, false>(acc, strip, place, scratch, visit);
    if (args.q) rows_to_table<Sum>(visit.q, args.q, place, scratch);
  }
};

}  // namespace fusedloss
