// The store: a tile's values to global memory, 32 columns at a time.
#pragma once

#include "tile.cuh"

namespace fusedloss {

// A quad's four fragments of one row, two numbers a lane and fragment, become one fragment a lane: 16 bytes in place of
// four times 4. `pair` is a 4 x 4 matrix over lanes and registers, transposed by two exchanges.
FUSEDLOSS_INLINE void transpose(uint32_t (&pair)[4], int t) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const bool upper = t & lanes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & lanes) continue;
      const uint32_t received = ptx::shuffle_xor(upper ? pair[k] : pair[k | lanes], lanes);
      pair[k] = upper ? received : pair[k];
      pair[k | lanes] = upper ? pair[k | lanes] : received;
    }
  }
}

// 32 columns, as soon as they are there: their registers are free for what follows.
template <class Out>
FUSEDLOSS_INLINE bool aligned_out(const Strip& strip) {
  return reinterpret_cast<uintptr_t>(strip.out) % 16 == 0 && strip.stride_om * int64_t(sizeof(Out)) % 16 == 0;
}
template <bool INNER, class Out, class S>
FUSEDLOSS_INLINE void store_group(float (&acc)[S::MT][S::NT][4], int k, const Strip& strip, const Place<S>& place) {
  const bool aligned = INNER || aligned_out<Out>(strip);
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    Out* row = static_cast<Out*>(strip.out) + int64_t(place.row(i)) * strip.stride_om;
    if constexpr (sizeof(Out) == 2) {
      Vector16 v;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        v.word[n] = ptx::pack(Out{}, at<S>(acc, i, 8 * k + 2 * n), at<S>(acc, i, 8 * k + 2 * n + 1));
      }
      transpose(v.word, place.t);
      const int col = place.col0 + 6 * place.t + 32 * k;  // 8 t instead of 2 t
      if (!INNER && (!place.has_row(i) || col >= place.N)) continue;
      if (INNER || (aligned && col + 8 <= place.N)) {
        ptx::store16(row + col, v);
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (col + c < place.N) row[col + c] = Out{uint16_t(v.word[c / 2] >> (16 * (c % 2)))};
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {  // a quad's 8 numbers are 32 bytes, one sector
        const int j = 8 * k + 2 * n, col = place.col(j);
        if (!INNER && (!place.has_row(i) || col >= place.N)) continue;
        if (INNER || (aligned && col + 2 <= place.N)) {
          ptx::store8(row + col, at<S>(acc, i, j), at<S>(acc, i, j + 1));
        } else {
          row[col] = at<S>(acc, i, j);
          if (col + 1 < place.N) row[col + 1] = at<S>(acc, i, j + 1);
        }
      }
    }
  }
}

}  // namespace fusedloss
