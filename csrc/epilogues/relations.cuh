// Which columns are a row's positives and which its negatives.
#pragma once

#include "masks.cuh"

namespace fusedloss {

// Positives are columns of equal label, or the target; the rest are negatives, but for the row itself.
template <class S>
struct Relations {
  bool labelled;
  Bits<S> alike;
  int own[S::ROWS];

  FUSEDLOSS_INLINE Relations(const int64_t* row_labels, const int64_t* key_labels, const int64_t* own_columns,
                             const Place<S>& place)
      : labelled(row_labels) {
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      own[i] = place.hit(own_columns, i);
#pragma unroll
      for (int w = 0; w < Bits<S>::WORDS; ++w) alike.word[i][w] = 0xffffffffu;
    }
    if (labelled) drop_where(alike, row_labels, key_labels, false, place);
  }
  FUSEDLOSS_INLINE bool positive(int i, int j, bool target) const { return labelled ? alike(i, j) : target; }
  template <bool INNER>
  FUSEDLOSS_INLINE bool counts(int i, int j, const Place<S>& place) const {
    return own[i] != place.offset(j) && (INNER || place.col(j) < place.N);
  }
};

}  // namespace fusedloss
