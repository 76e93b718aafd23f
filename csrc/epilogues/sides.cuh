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

// Maxima of f and sums of exp(f - maximum), of each side.
template <SideKind KIND>
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
      const bool counts = this->relations.template counts<INNER>(i, j, this->place);
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
    rows_to_table<Sum>(visit.count, args.count, place, scratch);
  }
};

// weight * exp(f - shift) * slope of each side, where the weights hold the loss's derivative by the side's log-sum-exp
// over the side's sum. q: row sums of what is before the slope, times v.
template <SideKind KIND>
struct SidesGrad {
  using Args = SidesArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : SidesVisitor<S> {
    float shift[2][S::ROWS], weight[2][S::ROWS], q[S::ROWS];

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place)
        : SidesVisitor<S>(args, strip, place) {
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
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const bool positive = this->relations.positive(i, j, element.target);
      float slope;
      const float f = side<KIND>(this->args, positive, element.sim, this->scale, slope);
      const float e = exponential(f - (positive ? shift[1][i] : shift[0][i]));
      const float own = positive ? weight[1][i] : weight[0][i];
      const bool counts = this->relations.template counts<INNER>(i, j, this->place) && own != 0;
      const float d = counts ? own * e : 0.0f;
      q[i] += counts ? d * element.sim : 0.0f;
      return counts ? d * slope : 0.0f;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place);
    for_each_logit<false, Out, false>(acc, strip, place, scratch, visit);
    rows_to_table<Sum>(visit.q, args.q, place, scratch);
  }
};

}  // namespace fusedloss
