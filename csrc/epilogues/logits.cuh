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

// What every visitor may leave out.
template <class S>
struct Visitor {
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
                           const float (&row_factor)[S::ROWS], const int (&target)[S::ROWS], Visit& visit) {
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
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (INNER) {
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
        if (strip.out) store_group<INNER, Out>(acc, j / (2 * kGroup), strip, place);
      }
      ptx::sync_warp();  // or else ptxas loads the columns of all groups ahead, and spills up to 100 bytes on sm_90
    }
  }
}

// Most tiles are inner ones, and bounds, targets and biases are half of what an element costs; but the two walks of an
// epilogue that is long anyway (SPLIT = false) would fill the instruction cache.
template <bool GENERAL, class Out, bool SPLIT = !GENERAL, class S, class Visit>
FUSEDLOSS_INLINE void for_each_logit(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Place<S>& place,
                                     Visit& visit) {
  float row_factor[S::ROWS];
  int target[S::ROWS];
  bool inner = !strip.bias && (place.pid_n + 1) * S::BLOCK_N <= place.N;
  if constexpr (!std::is_void_v<Out>) inner &= aligned_out<Out>(strip);
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    row_factor[i] = place.of_row(strip.row_factor, i, 1.0f);
    target[i] = place.hit(strip.target, i);
    inner &= place.has_row(i) && target[i] < 0;
  }
  if constexpr (SPLIT) {
    if (ptx::all(inner)) return walk<false, true, Out>(acc, strip, place, row_factor, target, visit);
  }
  walk<GENERAL, false, Out>(acc, strip, place, row_factor, target, visit);
}

}  // namespace fusedloss
