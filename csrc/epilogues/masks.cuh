// Which columns compete: every mask as bits, before the walk.
#pragma once

#include "math.cuh"
#include "tile.cuh"

namespace fusedloss {

// A bit per element of the thread's.
template <class S>
struct Bits {
  static constexpr int WORDS = (S::COLUMNS + 31) / 32;
  uint32_t word[S::ROWS][WORDS];

  FUSEDLOSS_INLINE bool operator()(int i, int j) const { return word[i][j / 32] >> (j % 32) & 1; }
};

template <class S>
FUSEDLOSS_INLINE void drop_where(Bits<S>& admit, const int64_t* rows, const int64_t* keys, bool equal,
                                 const Place<S>& place) {
  int64_t id[S::ROWS];
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) id[i] = place.id_of_row(rows, i);
  const int64_t* const first = keys + place.col0;
  const int last = place.N - 1 - place.col0;  // columns beyond take its number: nobody asks for them
#pragma unroll
  for (int w = 0; w < Bits<S>::WORDS; ++w) {
#pragma unroll 1
    for (int j = 32 * w; j < 32 * w + 32 && j < S::COLUMNS; j += 8) {  // eight loads in flight: one by one, each waits
      int64_t key[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) key[k] = ptx::load(first + (place.offset(j + k) < last ? place.offset(j + k) : last));
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) admit.word[i][w] &= ~(uint32_t((id[i] == key[k]) == equal) << ((j + k) % 32));
      }
    }
  }
}

// True where a column may compete; the target is not asked for. Masks are few numbers per row and column: a pass each,
// over bits, so that no more of them is alive than one.
template <class S>
FUSEDLOSS_INLINE void admitted(Bits<S>& admit, float (&acc)[S::MT][S::NT][4], const Strip& strip,
                               const Place<S>& place) {
  const Masks& masks = strip.masks;
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
#pragma unroll
    for (int w = 0; w < Bits<S>::WORDS; ++w) admit.word[i][w] = place.has_row(i) ? 0xffffffffu : 0;
  }
  for (int k = 0; k < kMaxCompares; ++k) {
    if (masks.drop_rows[k]) drop_where(admit, masks.drop_rows[k], masks.drop_keys[k], true, place);
    if (masks.keep_rows[k]) drop_where(admit, masks.keep_rows[k], masks.keep_keys[k], false, place);
  }
  if (masks.dense || masks.bits) {
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      if (!place.has_row(i)) continue;
      const uint8_t* dense = masks.dense + place.row(i) * masks.stride_dm;
      const int32_t* bits = masks.bits + place.row(i) * masks.stride_bm;
#pragma unroll
      for (int w = 0; w < Bits<S>::WORDS; ++w) {
#pragma unroll 1
        for (int j = 32 * w; j < 32 * w + 32 && j < S::COLUMNS; j += 8) {  // as above
          uint32_t drop[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int col = place.col(j + k) < place.N ? place.col(j + k) : place.N - 1;
            drop[k] = masks.dense && !ptx::load(dense + col * masks.stride_dn);
            if (masks.bits) drop[k] |= uint32_t(ptx::load(bits + col / 32)) >> (col % 32) & 1;
          }
#pragma unroll
          for (int k = 0; k < 8; ++k) admit.word[i][w] &= ~(drop[k] << ((j + k) % 32));
        }
      }
    }
  }
  if (masks.threshold) {
    float threshold[S::ROWS], row_factor[S::ROWS];
    Bits<S> exempt;
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      threshold[i] = place.of_row(masks.threshold, i, kInf);
      row_factor[i] = place.of_row(strip.row_factor, i, 1.0f);
#pragma unroll
      for (int w = 0; w < Bits<S>::WORDS; ++w) exempt.word[i][w] = 0;
      for (int k = 0; k < kMaxExempt && masks.exempt[k]; ++k) {
        const int hit = place.hit(masks.exempt[k], i);
        if (hit < 0 || hit % 8 > 1) continue;  // another lane's
        const int j = hit / 8 * 2 + hit % 8;
#pragma unroll
        for (int w = 0; w < Bits<S>::WORDS; ++w) {
          exempt.word[i][w] |= uint32_t(j / 32 == w && j < S::COLUMNS) << (j % 32);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < S::COLUMNS; ++j) {
      const float col_factor = place.of_col(strip.col_factor, j, 1.0f);
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        const bool above = at<S>(acc, i, j) * (row_factor[i] * col_factor) > threshold[i];
        admit.word[i][j / 32] &= ~(uint32_t(above) << (j % 32)) | exempt.word[i][j / 32];
      }
    }
  }
  if (masks.skip) {
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      const int hit = place.hit(masks.skip, i);
      if (hit < 0 || hit % 8 > 1) continue;
      const int j = hit / 8 * 2 + hit % 8;
#pragma unroll
      for (int w = 0; w < Bits<S>::WORDS; ++w) {
        admit.word[i][w] &= ~(uint32_t(j / 32 == w && j < S::COLUMNS) << (j % 32));
      }
    }
  }
}

}  // namespace fusedloss
