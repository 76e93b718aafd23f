// The softmax by rows and by columns: statistics, exponentials, gradient, and what is counted beside them.
#pragma once

#include "logits.cuh"
#include "sums.cuh"

namespace fusedloss {

// What is counted of a row's admissible negatives, where it is asked for.
template <class S>
struct Tally {
  bool wanted;
  float score[S::ROWS], count[S::ROWS], above[S::ROWS], max[S::ROWS], z[S::ROWS], sim[S::ROWS];

  FUSEDLOSS_INLINE Tally(const TallyArgs& args, const Place<S>& place) : wanted(args.score) {
    zero<S>(count), zero<S>(above), zero<S>(z), zero<S>(sim);
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) score[i] = place.of_row(args.score, i, 0.0f), max[i] = -kInf;
  }
  FUSEDLOSS_INLINE void add(int i, const Element& element) {
    if (!wanted) return;
    const bool admitted = element.z > -kInf;
    count[i] += admitted ? 1.0f : 0.0f;
    above[i] += element.z > score[i] ? 1.0f : 0.0f;
    max[i] = maximum(max[i], element.z);
    z[i] += admitted ? element.z : 0.0f;
    sim[i] += admitted ? element.sim : 0.0f;
  }
  FUSEDLOSS_INLINE void store(const TallyArgs& args, const Place<S>& place, typename S::Scratch& scratch) {
    if (!wanted) return;
    rows_to_table<Sum>(count, args.count, place, scratch);
    rows_to_table<Sum>(above, args.above, place, scratch);
    rows_to_table<Max>(max, args.max, place, scratch);
    rows_to_table<Sum>(z, args.z, place, scratch);
    rows_to_table<Sum>(sim, args.sim, place, scratch);
  }
};

// GENERAL here and below: masks, softcap, tally, smoothing and whatever else is given at run time. Without it an
// epilogue holds what the commonest losses need, and the registers of that.
template <bool GENERAL, bool COLUMNS>
struct Stats {
  using Args = StatsArgs;
  static constexpr bool NARROW = GENERAL;

  template <class S>
  struct Visit : Visitor<S> {
    Tally<S> tally;
    float max[S::ROWS];
    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place) : tally(args.tally, place) {
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) max[i] = -kInf;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int, const Element& element) {
      if constexpr (GENERAL) tally.add(i, element);
      max[i] = maximum(max[i], element.z);
      return element.z;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<GENERAL, void>(acc, strip, place, scratch, visit);
    if constexpr (GENERAL) visit.tally.store(args.tally, place, scratch);
    rows(acc, visit.max, args, place, scratch);
    if constexpr (COLUMNS) {
      if (!GENERAL || args.col_max) columns(acc, args, place, scratch);
    }
  }

  template <class S>
  static FUSEDLOSS_INLINE void rows(float (&acc)[S::MT][S::NT][4], float (&max)[S::ROWS], const Args& args,
                                    const Place<S>& place, typename S::Scratch& scratch) {
    float sum[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      sum[i] = 0;
      max[i] = over_quad<Max>(max[i]);
      const float shift = finite(max[i]);
#pragma unroll
      for (int j = 0; j < S::COLUMNS; ++j) sum[i] += exponential(at<S>(acc, i, j) - shift);
      sum[i] = over_quad<Sum>(sum[i]);
    }
    maxima_to_table(max, sum, args.row_max, args.row_sum, place, scratch);
  }

  template <class S>
  static FUSEDLOSS_INLINE void columns(float (&acc)[S::MT][S::NT][4], const Args& args, const Place<S>& place,
                                       typename S::Scratch& scratch) {
#pragma unroll
    for (int k = 0; k < S::NT / kGroup; ++k) {
      float max[8], sum[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        max[j] = -kInf, sum[j] = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          if (place.has_row(i)) max[j] = maximum(max[j], at<S>(acc, i, 8 * k + j));
        }
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          if (place.has_row(i)) sum[j] += exponential(at<S>(acc, i, 8 * k + j) - finite(max[j]));
        }
      }
      merge_over_rows(max, sum, place.g);
      scratch.col[0][place.warp_m][group_column(place, k)] = max[0];
      scratch.col[1][place.warp_m][group_column(place, k)] = sum[0];
    }
    columns_to_table<true>(args.col_max, args.col_sum, place, scratch);
  }
};

template <bool GENERAL, bool COLUMNS>
struct Exp {
  using Args = ExpArgs;
  static constexpr bool NARROW = GENERAL;

  template <class S>
  struct Visit : Visitor<S> {
    static constexpr bool STORES = !COLUMNS;
    const Args& args;
    const Place<S>& place;
    typename S::Scratch& scratch;
    Tally<S> tally;
    float row_sum[S::ROWS], col_sum[8];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place, typename S::Scratch& scratch)
        : args(args), place(place), scratch(scratch), tally(args.tally, place) {
      zero<S>(row_sum);
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) { col_sum[j % 8] = col_sum[j % 8 + 1] = 0; }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      if constexpr (GENERAL) tally.add(i, element);
      const float e = exponential(element.z - args.shift);
      row_sum[i] += e;
      if constexpr (COLUMNS) col_sum[j % 8] += INNER || place.has_row(i) ? e : 0.0f;
      return e;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void group(int k) {
      if constexpr (COLUMNS) scratch.col[0][place.warp_m][group_column(place, k)] = over_rows<Sum>(col_sum, place.g);
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place, scratch);
    for_each_logit<GENERAL, Out>(acc, strip, place, scratch, visit);
    if constexpr (GENERAL) visit.tally.store(args.tally, place, scratch);
    rows_to_table<Sum>(visit.row_sum, args.row_sum, place, scratch);
    if constexpr (COLUMNS) {
      if (!GENERAL || args.col_sum) columns_to_table<false>(args.col_sum, nullptr, place, scratch);
    }
  }
};

template <bool GENERAL, bool COLUMNS, bool Q>
struct Grad {
  using Args = GradArgs;
  static constexpr bool NARROW = GENERAL;

  // Of row `thread` of the tile and of the thread's columns. A weight of 0 gets shift +inf, because 0 * exp(z - shift)
  // may be NaN.
  template <class S>
  struct Ahead : Factors<S> {
    using Factors<S>::EACH, Factors<S>::column;
    float weight, shift, entry, target_sim;
    float col_weight[EACH], col_shift[EACH], col_target_sim[EACH];

    FUSEDLOSS_INLINE Ahead(const Strip& strip, const Args& args, const Place<S>& place) : Factors<S>(strip, place) {
      const float gain = args.gain ? ptx::load(args.gain) : 1.0f;
      if (place.thread < S::BLOCK_M) {
        weight = gain * place.of_local_row(args.row_weight, place.thread, 0.0f);
        shift = weight == 0 ? kInf : place.of_local_row(args.row_shift, place.thread, kInf);
        entry = gain * place.of_local_row(args.entry, place.thread, 0.0f);
        if constexpr (Q) target_sim = place.of_local_row(args.row_target_sim, place.thread, 0.0f);
      }
#pragma unroll
      for (int e = 0; COLUMNS && e < EACH; ++e) {
        col_weight[e] = gain * place.of_local_col(args.col_weight, column(place, e), 0.0f);
        col_shift[e] = col_weight[e] == 0 ? kInf : place.of_local_col(args.col_shift, column(place, e), kInf);
        if constexpr (Q) col_target_sim[e] = place.of_local_col(args.col_target_sim, column(place, e), 0.0f);
      }
    }
    FUSEDLOSS_INLINE void lay(const Place<S>& place, typename S::Scratch& scratch) const {
      Factors<S>::lay(place, scratch);
      if (place.thread < S::BLOCK_M) {
        rows(scratch, 0)[place.thread] = weight;
        rows(scratch, 1)[place.thread] = shift;
        rows(scratch, 2)[place.thread] = entry;
        if constexpr (Q) rows(scratch, 3)[place.thread] = target_sim;
      }
#pragma unroll
      for (int e = 0; COLUMNS && e < EACH; ++e) {
        scratch.col[0][0][column(place, e)] = col_weight[e];
        scratch.col[0][1][column(place, e)] = col_shift[e];
        if constexpr (Q) scratch.col[0][2][column(place, e)] = col_target_sim[e];
      }
    }
    // This fold sums no columns.
    FUSEDLOSS_INLINE static float* rows(typename S::Scratch& scratch, int vector) {
      static_assert(sizeof(scratch.col[1]) >= 4 * S::BLOCK_M * sizeof(float));
      return &scratch.col[1][0][0] + vector * S::BLOCK_M;
    }
  };

  template <class S>
  struct Visit : Visitor<S> {
    static constexpr bool STORES = !Q;
    const Args& args;
    const Place<S>& place;
    typename S::Scratch& scratch;
    float gain;
    float shift[S::ROWS], weight[S::ROWS], entry[S::ROWS], target_sim[S::ROWS], q[S::ROWS], smooth[S::ROWS];
    float col_shift[2], col_weight[2], col_target_sim[2];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place, typename S::Scratch& scratch)
        : args(args), place(place), scratch(scratch) {
      gain = args.gain ? ptx::load(args.gain) : 1.0f;
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        if constexpr (S::WARPGROUP) {
          const int row = place.local_row(i);
          weight[i] = Ahead<S>::rows(scratch, 0)[row];
          shift[i] = Ahead<S>::rows(scratch, 1)[row];
          entry[i] = Ahead<S>::rows(scratch, 2)[row];
          if constexpr (Q) target_sim[i] = Ahead<S>::rows(scratch, 3)[row];
        } else {
          weight[i] = gain * place.of_row(args.row_weight, i, 0.0f);
          shift[i] = weight[i] == 0 ? kInf : place.of_row(args.row_shift, i, kInf);
          entry[i] = gain * place.of_row(args.entry, i, 0.0f);
          if constexpr (Q) target_sim[i] = place.of_row(args.row_target_sim, i, 0.0f);
        }
        q[i] = 0;
        if constexpr (GENERAL) smooth[i] = gain * place.of_row(args.smooth, i, 0.0f);
      }
    }
    FUSEDLOSS_INLINE bool by_columns() const { return COLUMNS && (!GENERAL || args.col_shift); }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) {
      if (!by_columns()) return;
      if constexpr (S::WARPGROUP) {
        const Pair weights = pair_at(scratch.col[0][0], j, place), shifts = pair_at(scratch.col[0][1], j, place);
        [[maybe_unused]] Pair sims;
        if constexpr (Q) sims = pair_at(scratch.col[0][2], j, place);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          col_weight[e] = weights.x[e], col_shift[e] = shifts.x[e];
          if constexpr (Q) col_target_sim[e] = sims.x[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (INNER) {  // they are given
            col_weight[e] = gain * ptx::load(args.col_weight + place.col0 + place.offset(j + e));
            const float shift = ptx::load(args.col_shift + place.col0 + place.offset(j + e));
            col_shift[e] = col_weight[e] == 0 ? kInf : shift;
            if constexpr (Q) col_target_sim[e] = ptx::load(args.col_target_sim + place.col0 + place.offset(j + e));
          } else {
            col_weight[e] = gain * place.of_col(args.col_weight, j + e, 0.0f);
            col_shift[e] = col_weight[e] == 0 ? kInf : place.of_col(args.col_shift, j + e, kInf);
            if constexpr (Q) col_target_sim[e] = place.of_col(args.col_target_sim, j + e, 0.0f);
          }
        }
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      float dz = weight[i] * exponential(element.z - shift[i]);
      if constexpr (Q) q[i] += dz * (element.sim - target_sim[i]);
      if (by_columns()) {
        const float p = col_weight[j % 2] * exponential(element.z - col_shift[j % 2]);
        dz += p;
        if constexpr (Q) q[i] += p * (element.sim - col_target_sim[j % 2]);
      }
      if constexpr (GENERAL) dz -= element.z > -kInf ? smooth[i] : 0.0f;
      return element.target ? entry[i] : dz;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place, scratch);
    for_each_logit<GENERAL, Out>(acc, strip, place, scratch, visit);
    if constexpr (Q) {
      if (!GENERAL || args.q) {
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) visit.q[i] /= visit.gain;  // a power of two
        rows_to_table<Sum>(visit.q, args.q, place, scratch);
      }
    }
  }
};

}  // namespace fusedloss
