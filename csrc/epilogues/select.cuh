// Epilogues that read similarities and fold nothing: the largest, one, those above a threshold, all.
#pragma once

#include "logits.cuh"

namespace fusedloss {

struct Top {
  using Args = TopArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : Visitor<S> {
    float top[S::ROWS];
    int column[S::ROWS];
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      if (element.z > top[i] || element.z != element.z) top[i] = element.z, column[i] = Place<S>::offset(j);
      return element.z;
    }
  };

  // The larger logit, and of two alike the earlier column; NaN wins.
  static FUSEDLOSS_INLINE void join(float& top, int& column, float other, int other_column) {
    const bool other_wins = other > top || (other != other && top == top) || (other == top && other_column < column);
    top = other_wins ? other : top;
    column = other_wins ? other_column : column;
  }

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit;
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) visit.top[i] = -kInf, visit.column[i] = 0;
    for_each_logit<true, void>(acc, strip, place, scratch, visit);
    const int64_t line = int64_t(place.pid_n) * place.M;
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      float& top = visit.top[i];
      int column = place.col0 + visit.column[i];
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        join(top, column, ptx::shuffle_xor(top, lanes), ptx::shuffle_xor(column, lanes));
      }
      if constexpr (S::WARPS_N == 1) {
        if (place.t == 0 && place.has_row(i)) {
          args.top[line + place.row(i)] = top;
          args.column[line + place.row(i)] = column;
        }
      } else if (place.t == 0) {
        scratch.row[0][place.warp_n][place.local_row(i)] = top;
        scratch.row[1][place.warp_n][place.local_row(i)] = ptx::bits_to_float(uint32_t(column));
      }
    }
    if constexpr (S::WARPS_N > 1) {
      place.sync();
      const int row = place.pid_m * S::BLOCK_M + place.thread;
      if (place.thread < S::BLOCK_M && row < place.M) {
        float top = scratch.row[0][0][place.thread];
        int column = int(ptx::float_to_bits(scratch.row[1][0][place.thread]));
#pragma unroll
        for (int w = 1; w < S::WARPS_N; ++w) {
          const int other = int(ptx::float_to_bits(scratch.row[1][w][place.thread]));
          join(top, column, scratch.row[0][w][place.thread], other);
        }
        args.top[line + row] = top;
        args.column[line + row] = column;
      }
      place.sync();
    }
  }
};

// Reads one column a row out of the products themselves: a dot product beside them rounds otherwise.
struct Pick {
  using Args = PickArgs;
  static constexpr bool NARROW = false;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place) : args(args), place(place) {}
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int, const Element& element) {
      if (element.target && place.has_row(i)) args.picked[place.row(i)] = element.sim;
      return element.z;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<false, void, false>(acc, strip, place, scratch, visit);
  }
};

// One bit a column: 1 where its similarity exceeds the row's threshold. What a guide drops.
struct Guide {
  using Args = BitsArgs;
  static constexpr bool NARROW = false;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    float threshold[S::ROWS];
    uint32_t word[S::ROWS];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place) : args(args), place(place) {
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) threshold[i] = place.of_row(args.threshold, i, kInf), word[i] = 0;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      word[i] |= uint32_t(element.sim > threshold[i]) << (place.offset(j) % 32 + 2 * place.t);
      return element.z;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void group(int k) {
      const int place_of_word = (place.col0 - 2 * place.t) / 32 + k;
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        word[i] |= ptx::shuffle_xor(word[i], 1);
        word[i] |= ptx::shuffle_xor(word[i], 2);
        if (place.t == 0 && place.has_row(i) && place_of_word < args.words) {
          args.bits[int64_t(place.row(i)) * args.words + place_of_word] = int32_t(word[i]);
        }
        word[i] = 0;
      }
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<false, void>(acc, strip, place, scratch, visit);
  }
};

// The similarities themselves.
struct Store {
  using Args = StoreArgs;
  static constexpr bool NARROW = false;

  template <class S>
  struct Visit : Visitor<S> {
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int, int, const Element& element) { return element.product; }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args&,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit;
    for_each_logit<false, Out, false>(acc, strip, place, scratch, visit);
  }
};

}  // namespace fusedloss
