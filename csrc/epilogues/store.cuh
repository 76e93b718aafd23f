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

// The same of all of a thread's rows at once, through the warp's part of the scratch: two instructions a row instead of
// 16. The 16 bytes c of row r lie at c ^ r / 2 % 4, so that the eight rows of a matrix meet all banks. They are free
// again at the end of a group, where walk() has a barrier of the warp.
template <int ROWS>
FUSEDLOSS_INLINE void transpose(Vector16 (&v)[ROWS], Vector16 (&rows)[ROWS][32], int lane) {
  const auto place = [](int row, int c) { return 4 * row + (c ^ (row / 2 % 4)); };
  const int stored = place(lane % 8, lane / 8), taken = place(lane / 4, lane % 4);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) ptx::stmatrix(ptx::shared_address(&rows[i][stored]), v[i].word);
  ptx::sync_warp();
#pragma unroll
  for (int i = 0; i < ROWS; ++i) v[i] = rows[i][taken];
}

template <class Out>
FUSEDLOSS_INLINE bool aligned_out(const Strip& strip) {
  return reinterpret_cast<uintptr_t>(strip.out) % 16 == 0 && strip.stride_om * int64_t(sizeof(Out)) % 16 == 0;
}

// 16 bytes of 16-bit numbers to base[offset], the column col, or what of them is inside.
template <bool INNER, class Out, class S>
FUSEDLOSS_INLINE void store_row(Vector16 v, Out* base, int offset, int col, bool aligned, const Place<S>& place) {
  if (INNER || (aligned && col + 8 <= place.N)) {
    ptx::store16(base + offset, v);
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (col + c < place.N) base[offset + c] = Out{uint16_t(v.word[c / 2] >> (16 * (c % 2)))};
    }
  }
}

// 32 columns, as soon as they are there: their registers are free for what follows.
template <bool INNER, bool STMATRIX, class Out, class S>
FUSEDLOSS_INLINE void store_group(float (&acc)[S::MT][S::NT][4], int k, const Strip& strip, const Place<S>& place,
                                  typename S::Scratch& scratch) {
  const bool aligned = INNER || aligned_out<Out>(strip);
  if constexpr (sizeof(Out) == 2) {
    Vector16 v[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      Out* row = static_cast<Out*>(strip.out) + int64_t(place.row(i)) * strip.stride_om;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        v[i].word[n] = ptx::pack(Out{}, at<S>(acc, i, 8 * k + 2 * n), at<S>(acc, i, 8 * k + 2 * n + 1));
      }
      if constexpr (!STMATRIX) {
        transpose(v[i].word, place.t);
        const int col = place.col0 + 6 * place.t + 32 * k;  // 8 t instead of 2 t
        if (!INNER && (!place.has_row(i) || col >= place.N)) continue;
        store_row<INNER>(v[i], row, col, col, aligned, place);
      }
    }
    if constexpr (STMATRIX) {
      transpose(v, scratch.rows[place.thread / 32], place.thread % 32);
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        // All groups of a row from one address: 32 bits of a column would hide that from the compiler.
        Out* row = static_cast<Out*>(strip.out) + int64_t(place.row(i)) * strip.stride_om + place.col0 + 6 * place.t;
        const int col = place.col0 + 6 * place.t + 32 * k;
        if (!INNER && (!place.has_row(i) || col >= place.N)) continue;
        store_row<INNER>(v[i], row, 32 * k, col, aligned, place);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      Out* row = static_cast<Out*>(strip.out) + int64_t(place.row(i)) * strip.stride_om;
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
