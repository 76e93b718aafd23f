// Epilogues: what a tile of similarities folds into while it is in registers, and what of it is stored. One struct
// each, under the names of kernels/; the formulas are fusedloss/core/softmax.py's and folds.py's. epilogues/ has them:
//
//   tile, math      where a thread's elements are; functions of one number
//   sums            over the threads and warps that share a row or a column
//   masks, store    which columns compete; values to global memory
//   logits          the walk: an epilogue is its visitor
//   softmax, select, folds, sides    the epilogues; the latter two by relations, positives and negatives
//
// An epilogue sees one element after the other, column by column, and puts what is stored in its place: a second tile
// of registers is never alive. NARROW: with 128 accumulators a thread it would spill, or fill the instruction cache
// (sm_90).
#pragma once

#include "epilogues/folds.cuh"
#include "epilogues/select.cuh"
#include "epilogues/sides.cuh"
#include "epilogues/softmax.cuh"

namespace fusedloss {

// What an epilogue that stores stores.
template <class Epilogue, class T>
struct OutOf {
  using type = T;
};
template <class T>
struct OutOf<Store, T> {
  using type = float;
};

// What a fold on sm_90 fetches before the products, by `lay` into the scratch behind them.
template <class Epilogue, class S>
struct Ahead : Factors<S> {
  FUSEDLOSS_INLINE Ahead(const Strip& strip, const typename Epilogue::Args&, const Place<S>& place)
      : Factors<S>(strip, place) {}
};
template <bool GENERAL, bool COLUMNS, bool Q, class S>
struct Ahead<Grad<GENERAL, COLUMNS, Q>, S> : Grad<GENERAL, COLUMNS, Q>::template Ahead<S> {
  using Grad<GENERAL, COLUMNS, Q>::template Ahead<S>::Ahead;
};
template <SideKind KIND, class S>
struct Ahead<SidesGrad<KIND, true>, S> : SidesGrad<KIND, true>::template Ahead<S> {
  using SidesGrad<KIND, true>::template Ahead<S>::Ahead;
};

// The whole of what happens to a tile. `thread` counts within the shape's warps, `pid_m` in tiles of S::BLOCK_M rows.
template <class Epilogue, class T, class S>
FUSEDLOSS_INLINE void fold(float (&acc)[S::MT][S::NT][4], const Strip& strip, const typename Epilogue::Args& args,
                           const Place<S>& place, void* scratch) {
  place.sync();  // scratch may still be read: by the products as their shared memory, or for the tile before
  Epilogue::template run<typename OutOf<Epilogue, T>::type>(acc, strip, args, place,
                                                            *static_cast<typename S::Scratch*>(scratch));
}
template <class Epilogue, class T, class S>
FUSEDLOSS_INLINE void fold(float (&acc)[S::MT][S::NT][4], const Strip& strip, const typename Epilogue::Args& args,
                           int pid_m, int pid_n, int thread, void* scratch) {
  const Place<S> place(strip, pid_m, pid_n, thread);
  fold<Epilogue, T, S>(acc, strip, args, place, scratch);
}

}  // namespace fusedloss
