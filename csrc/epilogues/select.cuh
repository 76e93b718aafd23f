// Epilogues that read similarities and fold nothing: the largest, one, those above a threshold, all.
#pragma once

#include "logits.cuh"
#include "relations.cuh"
#include "sums.cuh"

namespace fusedloss {

// The larger value, and of two alike the earlier place; NaN wins.
FUSEDLOSS_INLINE void join_largest(float& value, int& place, float other, int other_place) {
  const bool nan = other != other && value == value, earlier = other == value && other_place < place;
  const bool other_wins = other > value || nan || earlier;
  value = other_wins ? other : value;
  place = other_wins ? other_place : place;
}

// A value per row of the thread's and its column, into line pid_n of tables [n_tiles, M].
template <class S>
FUSEDLOSS_INLINE void largest_to_table(float (&value)[S::ROWS], int (&column)[S::ROWS], float* values,
                                       int64_t* columns, const Place<S>& place, typename S::Scratch& scratch) {
  const int64_t line = int64_t(place.pid_n) * place.M;
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      join_largest(value[i], column[i], ptx::shuffle_xor(value[i], lanes), ptx::shuffle_xor(column[i], lanes));
    }
    if constexpr (S::WARPS_N == 1) {
      if (place.t == 0 && place.has_row(i)) {
        values[line + place.row(i)] = value[i];
        columns[line + place.row(i)] = column[i];
      }
    } else if (place.t == 0) {
      scratch.row[0][place.warp_n][place.local_row(i)] = value[i];
      scratch.row[1][place.warp_n][place.local_row(i)] = ptx::bits_to_float(uint32_t(column[i]));
    }
  }
  if constexpr (S::WARPS_N > 1) {
    place.sync();
    const int row = place.pid_m * S::BLOCK_M + place.thread;
    if (place.thread < S::BLOCK_M && row < place.M) {
      float first = scratch.row[0][0][place.thread];
      int where = int(ptx::float_to_bits(scratch.row[1][0][place.thread]));
#pragma unroll
      for (int w = 1; w < S::WARPS_N; ++w) {
        const int other = int(ptx::float_to_bits(scratch.row[1][w][place.thread]));
        join_largest(first, where, scratch.row[0][w][place.thread], other);
      }
      values[line + row] = first;
      columns[line + row] = where;
    }
    place.sync();
  }
}

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

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit;
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) visit.top[i] = -kInf, visit.column[i] = 0;
    for_each_logit<true, void>(acc, strip, place, scratch, visit);
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) visit.column[i] += place.col0;
    largest_to_table(visit.top, visit.column, args.top, args.column, place, scratch);
  }
};

// Of one matrix against itself: each row's largest logit of another label, and the largest of the negated ones of its
// own, itself left out; with column tables, the same of the columns as rows. A NaN is none of them. Nothing but z of
// the strip's is given: biases are the arguments'.
struct Opposed {
  using Args = OpposedArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    Relations<S> relations;
    float bias[2], top[2][S::ROWS];  // others, then alike
    int column[2][S::ROWS];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place)
        : args(args), place(place), relations(args.row_labels, args.key_labels, args.own, place) {
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        top[0][i] = top[1][i] = -kInf;
        column[0][i] = column[1][i] = 0;
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) bias[e] = place.of_col(args.col_bias, j + e, 0.0f);
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const bool alike = relations.positive(i, j, false);
      const bool counts = relations.template counts<INNER>(i, j, place);
      const float z = element.z + bias[j % 2];
      if (counts && !alike && z > top[0][i]) top[0][i] = z, column[0][i] = Place<S>::offset(j);
      if (counts && alike && -z > top[1][i]) top[1][i] = -z, column[1][i] = Place<S>::offset(j);
      return counts && place.has_row(i) ? element.z : kNone;
    }
  };
  static constexpr float kNone = __builtin_nanf("");

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<false, void, false>(acc, strip, place, scratch, visit);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) visit.column[k][i] += place.col0;
      largest_to_table(visit.top[k], visit.column[k], k ? args.alike : args.other,
                       k ? args.alike_column : args.other_column, place, scratch);
    }
    if (args.col_other) {
      columns<false>(acc, visit.relations, args, args.col_other, args.col_other_row, place, scratch);
      columns<true>(acc, visit.relations, args, args.col_alike, args.col_alike_row, place, scratch);
    }
  }

  // What is stored of the walk is NaN where a pair does not count.
  template <bool ALIKE, class S>
  static FUSEDLOSS_INLINE void columns(float (&acc)[S::MT][S::NT][4], const Relations<S>& relations, const Args& args,
                                       float* values, int64_t* rows, const Place<S>& place,
                                       typename S::Scratch& scratch) {
    float bias[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) bias[i] = place.of_row(args.row_bias, i, 0.0f);
#pragma unroll
    for (int k = 0; k < S::NT / kGroup; ++k) {
      float top[8];
      int row[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        top[j] = -kInf, row[j] = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          const float z = at<S>(acc, i, 8 * k + j) + bias[i], value = ALIKE ? -z : z;
          if (relations.positive(i, 8 * k + j, false) == ALIKE && value > top[j]) top[j] = value, row[j] = place.row(i);
        }
      }
#pragma unroll
      for (int half = 4; half > 0; half /= 2) {  // as in over_rows
        const bool upper = place.g & half;
#pragma unroll
        for (int j = 0; j < half; ++j) {
          const float sent = upper ? top[j] : top[j + half];
          const int sent_row = upper ? row[j] : row[j + half];
          top[j] = upper ? top[j + half] : top[j];
          row[j] = upper ? row[j + half] : row[j];
          join_largest(top[j], row[j], ptx::shuffle_xor(sent, 4 * half), ptx::shuffle_xor(sent_row, 4 * half));
        }
      }
      scratch.col[0][place.warp_m][group_column(place, k)] = top[0];
      scratch.col[1][place.warp_m][group_column(place, k)] = ptx::bits_to_float(uint32_t(row[0]));
    }
    place.sync();
    const int64_t line = int64_t(place.pid_m) * place.N;
    for (int c = place.thread; c < S::BLOCK_N; c += S::THREADS) {
      const int col = place.pid_n * S::BLOCK_N + c;
      if (col >= place.N) break;
      float first = scratch.col[0][0][c];
      int where = int(ptx::float_to_bits(scratch.col[1][0][c]));
#pragma unroll
      for (int w = 1; w < S::WARPS_M; ++w) {
        join_largest(first, where, scratch.col[0][w][c], int(ptx::float_to_bits(scratch.col[1][w][c])));
      }
      values[line + col] = first;
      rows[line + col] = where;
    }
    place.sync();
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
