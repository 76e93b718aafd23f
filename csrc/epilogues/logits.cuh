// The walk over a tile's logits, and what an epilogue brings to it: a visitor.
#pragma once

#include <type_traits>

#include "masks.cuh"
#include "math.cuh"
#include "store.cuh"
#include "tile.cuh"

namespace fusedloss {

struct Element {
  float z;        // -inf at the target, outside of the matrix and where a column is removed
  float sim;      // row_factor * col_factor * <x, y>
  float product;  // <x, y>
  bool target;
};

// What a fold reads of vectors is fetched before the products of a warpgroup on sm_90, which hide the way to L2, and
// laid into the scratch behind them: a number of a column once for all warps. This is what every fold reads.
template <class S>
struct Factors {
  static constexpr int EACH = S::BLOCK_N / S::THREADS;  // columns of a thread
  float factor[EACH];

  FUSEDLOSS_INLINE Factors(const Strip& strip, const Place<S>& place) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) factor[e] = place.of_local_col(strip.col_factor, column(place, e), 1.0f);
  }
  FUSEDLOSS_INLINE static int column(const Place<S>& place, int e) { return place.thread + e * S::THREADS; }
  FUSEDLOSS_INLINE void lay(const Place<S>& place, typename S::Scratch& scratch) const {
#pragma unroll
    for (int e = 0; e < EACH; ++e) scratch.factor[column(place, e)] = factor[e];
  }
};

// Numbers of the columns j and j + 1, out of those of the tile.
struct alignas(8) Pair {
  float x[2];
};
template <class S>
FUSEDLOSS_INLINE Pair pair_at(const float* columns, int j, const Place<S>& place) {
  return *reinterpret_cast<const Pair*>(columns + place.local_col(j));
}

// What every visitor may leave out.
template <class S>
struct Visitor {
  // Always, so that there is no question for each group of columns. Where ptxas would then mix groups, and spill, the
  // question stays.
  static constexpr bool STORES = false;
  static constexpr bool STMATRIX = S::WARPGROUP;  // rows for the store through the scratch
  template <bool INNER>
  FUSEDLOSS_INLINE void columns(int) {}
  template <bool INNER>
  FUSEDLOSS_INLINE void group(int) {}
};

// Visits every element of the tile: `visit.columns(j)` before columns j and j + 1, `visit.value(i, j, element)` for
// their rows, `visit.group(k)` after 32 columns. The value takes the accumulator's place. Unless Out is void it is
// stored, times the softcap's derivative and both factors, so that the next two products take x and y as they are.
// GENERAL: masks and a softcap. INNER: nothing of the warp's part is outside of the matrix, none of it a target, no
// bias.
template <bool GENERAL, bool INNER, class Out, class S, class Visit>
FUSEDLOSS_INLINE void walk(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Place<S>& place,
                           const float (&row_factor)[S::ROWS], const int (&target)[S::ROWS],
                           typename S::Scratch& scratch, Visit& visit) {
  const float scale = ptx::load(strip.scale);
  [[maybe_unused]] const float* const col_factors = INNER ? place.from_col(strip.col_factor) : nullptr;
  Bits<S> admit;
  int own[S::ROWS];
  float own_scale = 0;
  [[maybe_unused]] const float inverse_softcap = GENERAL && strip.softcap > 0 ? 1 / strip.softcap : 0.0f;
  if constexpr (GENERAL) {
    admitted(admit, acc, strip, place);
    if (strip.masks.own) own_scale = ptx::load(strip.masks.own_scale);
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) own[i] = place.hit(strip.masks.own, i);
  }
#pragma unroll
  for (int j = 0; j < S::COLUMNS; j += 2) {
    float col_factor[2], bias[2];
    [[maybe_unused]] Pair factors;
    if constexpr (S::WARPGROUP) factors = pair_at(scratch.factor, j, place);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (S::WARPGROUP) {
        col_factor[e] = factors.x[e];
        bias[e] = INNER ? 0 : place.of_col(strip.bias, j + e, place.col(j + e) < place.N ? 0.0f : -kInf);
      } else if constexpr (INNER) {
        col_factor[e] = col_factors ? ptx::load(col_factors + place.offset(j + e)) : 1.0f;
        bias[e] = 0;
      } else {
        col_factor[e] = place.of_col(strip.col_factor, j + e, 1.0f);
        bias[e] = place.of_col(strip.bias, j + e, place.col(j + e) < place.N ? 0.0f : -kInf);
      }
    }
    visit.template columns<INNER>(j);
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Element element;
        const float factor = row_factor[i] * col_factor[e];
        element.product = at<S>(acc, i, j + e);
        element.sim = element.product * factor;
        element.z = element.sim * scale;
        element.target = !INNER && target[i] == place.offset(j + e);
        if constexpr (!INNER) {
          bool removed = bias[e] == -kInf;  // not a sum alone: NaN in a removed column must not outlive the -inf
          if constexpr (GENERAL) {
            if (own[i] == place.offset(j + e)) element.z = element.sim * own_scale;
            removed |= !admit(i, j + e);
          }
          element.z += bias[e];
          if constexpr (GENERAL) {
            if (strip.softcap > 0) element.z = strip.softcap * tanh(element.z * inverse_softcap);
          }
          if (removed || element.target) element.z = -kInf;
        }
        float value = visit.template value<INNER>(i, j + e, element);
        if constexpr (!std::is_void_v<Out>) {
          if constexpr (GENERAL) {
            // What was dropped is 0, and the target's entry has its own.
            const float bend = element.z * inverse_softcap;
            if (strip.softcap > 0 && element.z > -kInf) value *= 1 - bend * bend;
          }
          value *= factor;
        }
        at<S>(acc, i, j + e) = value;
      }
    }
    if (j % (2 * kGroup) == 2 * (kGroup - 1)) {
      visit.template group<INNER>(j / (2 * kGroup));
      if constexpr (!std::is_void_v<Out>) {
        if ((S::WARPGROUP && Visit::STORES) || strip.out) {
          store_group<INNER, Visit::STMATRIX, Out>(acc, j / (2 * kGroup), strip, place, scratch);
        }
      }
      // Or else ptxas loads the columns of all groups ahead, and spills up to 100 bytes on sm_90; there a group's rows
      // are also read before the next group's overwrite them.
      ptx::sync_warp();
    }
  }
}

// Most tiles are inner ones, and bounds, targets and biases are half of what an element costs; but the two walks of an
// epilogue that is long anyway (SPLIT = false) would fill the instruction cache.
template <bool GENERAL, class Out, bool SPLIT = !GENERAL, class S, class Visit>
FUSEDLOSS_INLINE void for_each_logit(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Place<S>& place,
                                     typename S::Scratch& scratch, Visit& visit) {
  float row_factor[S::ROWS];
  int target[S::ROWS];
  bool inner = !strip.bias && (place.pid_n + 1) * S::BLOCK_N <= place.N;
  if constexpr (!std::is_void_v<Out>) inner &= aligned_out<Out>(strip);
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    if constexpr (S::WARPGROUP) {
      row_factor[i] = place.row_factor[i];
      target[i] = place.target[i];
    } else {
      row_factor[i] = place.of_row(strip.row_factor, i, 1.0f);
      target[i] = place.hit(strip.target, i);
    }
    inner &= place.has_row(i) && target[i] < 0;
  }
  if constexpr (SPLIT) {
    if (ptx::all(inner)) return walk<false, true, Out>(acc, strip, place, row_factor, target, scratch, visit);
  }
  walk<GENERAL, false, Out>(acc, strip, place, row_factor, target, scratch, visit);
}

}  // namespace fusedloss
