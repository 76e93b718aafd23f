// Epilogues: what a tile of similarities folds into while it is in registers, and what of it is stored. One struct
// each, under the names of kernels/softmax.py and kernels/masks.py; the formulas are fusedloss/epilogues.py's and
// folds.py's.
//
// A thread holds its part of a tile as mma.m16n8 fragments do, which is also how wgmma.m64 lays them out: lane 4 g + t
// has rows g and g + 8 and columns 2 t and 2 t + 1 of each. An epilogue sees one element after the other, column by
// column, and puts what is stored in its place: a second tile of registers is never alive.
#pragma once

#include <cmath>
#include <type_traits>

#include "ptx.cuh"
#include "similarity.h"

namespace fusedloss {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInf = __builtin_huge_valf();
constexpr int kGroup = 4;  // fragments side by side: 32 columns, 8 of them a thread's

FUSEDLOSS_INLINE float maximum(float a, float b) { return fmaxf(a, b); }

// A shift for exponents: -inf - -inf would be NaN where every column is masked.
FUSEDLOSS_INLINE float finite(float max) { return max == -kInf ? 0.0f : max; }

// log2(e) enters after the shift is subtracted: large logits do not magnify its rounding.
FUSEDLOSS_INLINE float exponential(float x) { return ptx::exp2(x * kLog2e); }

// To 2 ulp: where 1 - exp(-2 |x|) would cancel, the series.
FUSEDLOSS_INLINE float tanh(float x) {
  const float square = x * x;
  float series = 62.0f / 2835 * square - 17.0f / 315;
  series = ((series * square + 2.0f / 15) * square - 1.0f / 3) * square;
  const float e = ptx::exp2(fabsf(x) * (-2 * kLog2e));
  const float far = (1 - e) * ptx::reciprocal(1 + e);
  return square < 0.09f ? x + x * series : x < 0 ? -far : far;
}

// log(1 + e) for 0 <= e <= 1 to 3 ulp, as 2 atanh(e / (2 + e)): the terms that are left out are 1.4e-8 of it. A fifth
// of log1pf's instructions.
FUSEDLOSS_INLINE float log1p(float e) {
  const float s = e * ptx::reciprocal(2 + e), q = s * s;
  float series = 1.0f / 11 + q * (1.0f / 13);
  series = 1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * series));
  return 2 * (s + s * (q * (1.0f / 3 + q * series)));
}

// Shape and place -----------------------------------------------------------------------------------------------------

// WARPS_M x WARPS_N warps, each with MT x NT fragments. BARRIER: 0 where they are the whole block, else the first of
// two named barriers: a warpgroup takes the one of its row tile's parity.
template <int MT_, int NT_, int WARPS_M_, int WARPS_N_, int BARRIER_ = 0>
struct Shape {
  static constexpr int MT = MT_, NT = NT_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, BARRIER = BARRIER_;
  static constexpr int BLOCK_M = 16 * MT * WARPS_M, BLOCK_N = 8 * NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int ROWS = 2 * MT, COLUMNS = 2 * NT;  // of one thread
  static_assert(NT % kGroup == 0, "columns are stored and summed 32 at a time");

  using Accumulators = float[MT][NT][4];

  // Where the parts of a row, and of a column, meet that several warps hold.
  struct Scratch {
    float row[2][WARPS_N][BLOCK_M];
    float col[2][WARPS_M][BLOCK_N];
  };
};

template <class S>
FUSEDLOSS_INLINE float& at(float (&acc)[S::MT][S::NT][4], int i, int j) {
  return acc[i / 2][j / 2][2 * (i % 2) + j % 2];
}

template <class S>
struct Place {
  int pid_m, pid_n, thread, M, N;
  int t, g, warp_m, warp_n;
  int row0, col0;  // of the thread's first row and column

  FUSEDLOSS_INLINE Place(const Strip& strip, int pid_m, int pid_n, int thread)
      : pid_m(pid_m), pid_n(pid_n), thread(thread), M(strip.M), N(strip.N) {
    t = thread % 4, g = thread % 32 / 4, warp_m = thread / 32 / S::WARPS_N, warp_n = thread / 32 % S::WARPS_N;
    row0 = pid_m * S::BLOCK_M + local_row(0);
    col0 = pid_n * S::BLOCK_N + warp_n * 8 * S::NT + 2 * t;
  }
  FUSEDLOSS_INLINE int local_row(int i) const { return warp_m * 16 * S::MT + g + 16 * (i / 2) + 8 * (i % 2); }
  FUSEDLOSS_INLINE int row(int i) const { return row0 + 16 * (i / 2) + 8 * (i % 2); }
  FUSEDLOSS_INLINE static constexpr int offset(int j) { return 8 * (j / 2) + j % 2; }
  FUSEDLOSS_INLINE int col(int j) const { return col0 + offset(j); }
  FUSEDLOSS_INLINE bool has_row(int i) const { return row(i) < M; }

  FUSEDLOSS_INLINE void sync() const {
    if constexpr (S::BARRIER) {
      ptx::sync_named(S::BARRIER + pid_m % 2, S::THREADS);
    } else {
      ptx::sync();
    }
  }

  // A number of the row, or `other` below the matrix or without a vector.
  FUSEDLOSS_INLINE float of_row(const float* vector, int i, float other) const {
    return vector && has_row(i) ? ptx::load(vector + row(i)) : other;
  }
  FUSEDLOSS_INLINE float of_col(const float* vector, int j, float other) const {
    return vector && col(j) < N ? ptx::load(vector + col(j)) : other;
  }
  // Inside, of a vector that starts at the thread's first column: one address for all of them.
  FUSEDLOSS_INLINE const float* from_col(const float* vector) const { return vector ? vector + col0 : nullptr; }
  FUSEDLOSS_INLINE int64_t id_of_row(const int64_t* vector, int i) const {
    return has_row(i) ? ptx::load(vector + row(i)) : -1;
  }
  // Where the row's column lies beside the thread's first one, to be compared with offset(j): 64 bits once a row, 32
  // an element. -1 where the tile does not hold it.
  FUSEDLOSS_INLINE int hit(const int64_t* columns, int i) const {
    if (!columns || !has_row(i)) return -1;
    const uint64_t column = uint64_t(ptx::load(columns + row(i))) - uint64_t(col0);  // any number: it may wrap around
    return column < S::BLOCK_N ? int(column) : -1;
  }
};

// Sums over threads and warps -----------------------------------------------------------------------------------------

struct Sum {
  static FUSEDLOSS_INLINE float join(float a, float b) { return a + b; }
};
struct Max {
  static FUSEDLOSS_INLINE float join(float a, float b) { return maximum(a, b); }
};

// Over the four lanes that share a row.
template <class Op>
FUSEDLOSS_INLINE float over_quad(float x) {
  x = Op::join(x, ptx::shuffle_xor(x, 1));
  return Op::join(x, ptx::shuffle_xor(x, 2));
}

// What a maximum and a sum relative to it become beside another: one exponential, of the smaller maximum.
FUSEDLOSS_INLINE void merge(float& max, float& sum, float other_max, float other_sum) {
  const bool smaller = max < other_max;
  const float high = smaller ? other_max : max, low = smaller ? max : other_max;
  const float fade = exponential(low - finite(high));
  sum = smaller ? other_sum + sum * fade : sum + other_sum * fade;
  max = high;
}

// Eight columns a thread become one: each exchange halves them, so that seven replace 24.
template <class Op>
FUSEDLOSS_INLINE float over_rows(float (&v)[8], int g) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float sent = upper ? v[k] : v[k + half], kept = upper ? v[k + half] : v[k];
      v[k] = Op::join(kept, ptx::shuffle_xor(sent, 4 * half));
    }
  }
  return v[0];
}
FUSEDLOSS_INLINE void merge_over_rows(float (&max)[8], float (&sum)[8], int g) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float sent = upper ? max[k] : max[k + half], sent_sum = upper ? sum[k] : sum[k + half];
      max[k] = upper ? max[k + half] : max[k];
      sum[k] = upper ? sum[k + half] : sum[k];
      merge(max[k], sum[k], ptx::shuffle_xor(sent, 4 * half), ptx::shuffle_xor(sent_sum, 4 * half));
    }
  }
}
// The column within the block whose sum `over_rows` of group k leaves in this lane.
template <class S>
FUSEDLOSS_INLINE int group_column(const Place<S>& place, int k) {
  return (place.warp_n * S::NT + kGroup * k + place.g / 2) * 8 + 2 * place.t + place.g % 2;
}

// A number per row of the thread's, joined over its row, into line pid_n of a table [n_tiles, M].
template <class Op, class S>
FUSEDLOSS_INLINE void rows_to_table(float (&v)[S::ROWS], float* table, const Place<S>& place,
                                    typename S::Scratch& scratch) {
  table += int64_t(place.pid_n) * place.M;
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    v[i] = over_quad<Op>(v[i]);
    if constexpr (S::WARPS_N == 1) {
      if (place.t == 0 && place.has_row(i)) table[place.row(i)] = v[i];
    } else {
      if (place.t == 0) scratch.row[0][place.warp_n][place.local_row(i)] = v[i];
    }
  }
  if constexpr (S::WARPS_N > 1) {
    place.sync();
    const int row = place.pid_m * S::BLOCK_M + place.thread;
    if (place.thread < S::BLOCK_M && row < place.M) {
      float joined = scratch.row[0][0][place.thread];
#pragma unroll
      for (int w = 1; w < S::WARPS_N; ++w) joined = Op::join(joined, scratch.row[0][w][place.thread]);
      table[row] = joined;
    }
    place.sync();
  }
}

// Maxima, and sums relative to them, that each quad knows of its columns.
template <class S>
FUSEDLOSS_INLINE void maxima_to_table(float (&max)[S::ROWS], float (&sum)[S::ROWS], float* max_table, float* sum_table,
                                      const Place<S>& place, typename S::Scratch& scratch) {
  const int64_t line = int64_t(place.pid_n) * place.M;
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    if (place.t != 0) continue;
    if constexpr (S::WARPS_N > 1) {
      scratch.row[0][place.warp_n][place.local_row(i)] = max[i];
      scratch.row[1][place.warp_n][place.local_row(i)] = sum[i];
    } else if (place.has_row(i)) {
      max_table[line + place.row(i)] = max[i];
      sum_table[line + place.row(i)] = sum[i];
    }
  }
  if constexpr (S::WARPS_N > 1) {
    place.sync();
    const int row = place.pid_m * S::BLOCK_M + place.thread;
    if (place.thread < S::BLOCK_M && row < place.M) {
      float first = scratch.row[0][0][place.thread], total = scratch.row[1][0][place.thread];
#pragma unroll
      for (int w = 1; w < S::WARPS_N; ++w) {
        merge(first, total, scratch.row[0][w][place.thread], scratch.row[1][w][place.thread]);
      }
      max_table[line + row] = first;
      sum_table[line + row] = total;
    }
    place.sync();
  }
}

// What warps left in scratch.col, into line pid_m of tables [m_tiles, N]. SUMS: merges maxima and sums.
template <bool SUMS, class S>
FUSEDLOSS_INLINE void columns_to_table(float* table, float* sums, const Place<S>& place,
                                       typename S::Scratch& scratch) {
  place.sync();
  for (int c = place.thread; c < S::BLOCK_N; c += S::THREADS) {
    const int col = place.pid_n * S::BLOCK_N + c;
    if (col >= place.N) break;
    float first = scratch.col[0][0][c], sum = SUMS ? scratch.col[1][0][c] : 0.0f;
#pragma unroll
    for (int w = 1; w < S::WARPS_M; ++w) {
      if constexpr (SUMS) {
        merge(first, sum, scratch.col[0][w][c], scratch.col[1][w][c]);
      } else {
        first += scratch.col[0][w][c];
      }
    }
    table[int64_t(place.pid_m) * place.N + col] = first;
    if constexpr (SUMS) sums[int64_t(place.pid_m) * place.N + col] = sum;
  }
  place.sync();
}

// Masks ---------------------------------------------------------------------------------------------------------------

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

// The store -----------------------------------------------------------------------------------------------------------

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

// Logits --------------------------------------------------------------------------------------------------------------

struct Element {
  float z;        // -inf at the target, outside of the matrix and where a column is removed
  float sim;      // row_factor * col_factor * <x, y>
  float product;  // <x, y>
  bool target;
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

// What every visitor may leave out.
template <class S>
struct Visitor {
  template <bool INNER>
  FUSEDLOSS_INLINE void columns(int) {}
  template <bool INNER>
  FUSEDLOSS_INLINE void group(int) {}
};

template <class S>
FUSEDLOSS_INLINE void zero(float (&v)[S::ROWS]) {
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) v[i] = 0;
}

// What is counted of a row's admissible negatives, where it is asked for.
template <class S>
struct Tally {
  bool wanted;
  float score[S::ROWS], count[S::ROWS], above[S::ROWS], max[S::ROWS], z[S::ROWS], sim[S::ROWS];

  FUSEDLOSS_INLINE Tally(const TallyArgs& args, const Place<S>& place) : wanted(args.score) {
    zero<S>(count), zero<S>(above), zero<S>(z), zero<S>(sim);
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) score[i] = place.of_row(args.score, i, 0.0f), max[i] = -kInf;
  }
  FUSEDLOSS_INLINE void add(int i, const Element& element) {
    if (!wanted) return;
    const bool admitted = element.z > -kInf;
    count[i] += admitted ? 1.0f : 0.0f;
    above[i] += element.z > score[i] ? 1.0f : 0.0f;
    max[i] = maximum(max[i], element.z);
    z[i] += admitted ? element.z : 0.0f;
    sim[i] += admitted ? element.sim : 0.0f;
  }
  FUSEDLOSS_INLINE void store(const TallyArgs& args, const Place<S>& place, typename S::Scratch& scratch) {
    if (!wanted) return;
    rows_to_table<Sum>(count, args.count, place, scratch);
    rows_to_table<Sum>(above, args.above, place, scratch);
    rows_to_table<Max>(max, args.max, place, scratch);
    rows_to_table<Sum>(z, args.z, place, scratch);
    rows_to_table<Sum>(sim, args.sim, place, scratch);
  }
};

// Softmax -------------------------------------------------------------------------------------------------------------

// GENERAL here and below: masks, softcap, tally, smoothing and whatever else is given at run time. Without it an
// epilogue holds what the commonest losses need, and the registers of that. NARROW: with 128 accumulators a thread it
// would spill, or fill the instruction cache (sm_90).
template <bool GENERAL, bool COLUMNS>
struct Stats {
  using Args = StatsArgs;
  static constexpr bool NARROW = GENERAL;

  template <class S>
  struct Visit : Visitor<S> {
    Tally<S> tally;
    float max[S::ROWS];
    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place) : tally(args.tally, place) {
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) max[i] = -kInf;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int, const Element& element) {
      if constexpr (GENERAL) tally.add(i, element);
      max[i] = maximum(max[i], element.z);
      return element.z;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<GENERAL, void>(acc, strip, place, visit);
    if constexpr (GENERAL) visit.tally.store(args.tally, place, scratch);
    rows(acc, visit.max, args, place, scratch);
    if constexpr (COLUMNS) {
      if (!GENERAL || args.col_max) columns(acc, args, place, scratch);
    }
  }

  template <class S>
  static FUSEDLOSS_INLINE void rows(float (&acc)[S::MT][S::NT][4], float (&max)[S::ROWS], const Args& args,
                                    const Place<S>& place, typename S::Scratch& scratch) {
    float sum[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      sum[i] = 0;
      max[i] = over_quad<Max>(max[i]);
      const float shift = finite(max[i]);
#pragma unroll
      for (int j = 0; j < S::COLUMNS; ++j) sum[i] += exponential(at<S>(acc, i, j) - shift);
      sum[i] = over_quad<Sum>(sum[i]);
    }
    maxima_to_table(max, sum, args.row_max, args.row_sum, place, scratch);
  }

  template <class S>
  static FUSEDLOSS_INLINE void columns(float (&acc)[S::MT][S::NT][4], const Args& args, const Place<S>& place,
                                       typename S::Scratch& scratch) {
#pragma unroll
    for (int k = 0; k < S::NT / kGroup; ++k) {
      float max[8], sum[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        max[j] = -kInf, sum[j] = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          if (place.has_row(i)) max[j] = maximum(max[j], at<S>(acc, i, 8 * k + j));
        }
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) {
          if (place.has_row(i)) sum[j] += exponential(at<S>(acc, i, 8 * k + j) - finite(max[j]));
        }
      }
      merge_over_rows(max, sum, place.g);
      scratch.col[0][place.warp_m][group_column(place, k)] = max[0];
      scratch.col[1][place.warp_m][group_column(place, k)] = sum[0];
    }
    columns_to_table<true>(args.col_max, args.col_sum, place, scratch);
  }
};

template <bool GENERAL, bool COLUMNS>
struct Exp {
  using Args = ExpArgs;
  static constexpr bool NARROW = GENERAL;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    typename S::Scratch& scratch;
    Tally<S> tally;
    float row_sum[S::ROWS], col_sum[8];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place, typename S::Scratch& scratch)
        : args(args), place(place), scratch(scratch), tally(args.tally, place) {
      zero<S>(row_sum);
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) { col_sum[j % 8] = col_sum[j % 8 + 1] = 0; }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      if constexpr (GENERAL) tally.add(i, element);
      const float e = exponential(element.z - args.shift);
      row_sum[i] += e;
      if constexpr (COLUMNS) col_sum[j % 8] += INNER || place.has_row(i) ? e : 0.0f;
      return e;
    }
    template <bool INNER>
    FUSEDLOSS_INLINE void group(int k) {
      if constexpr (COLUMNS) scratch.col[0][place.warp_m][group_column(place, k)] = over_rows<Sum>(col_sum, place.g);
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place, scratch);
    for_each_logit<GENERAL, Out>(acc, strip, place, visit);
    if constexpr (GENERAL) visit.tally.store(args.tally, place, scratch);
    rows_to_table<Sum>(visit.row_sum, args.row_sum, place, scratch);
    if constexpr (COLUMNS) {
      if (!GENERAL || args.col_sum) columns_to_table<false>(args.col_sum, nullptr, place, scratch);
    }
  }
};

template <bool GENERAL, bool COLUMNS, bool Q>
struct Grad {
  using Args = GradArgs;
  static constexpr bool NARROW = GENERAL || (COLUMNS && Q);

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    float gain;
    float shift[S::ROWS], weight[S::ROWS], entry[S::ROWS], target_sim[S::ROWS], q[S::ROWS], smooth[S::ROWS];
    float col_shift[2], col_weight[2], col_target_sim[2];

    FUSEDLOSS_INLINE Visit(const Args& args, const Place<S>& place) : args(args), place(place) {
      gain = args.gain ? ptx::load(args.gain) : 1.0f;
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        weight[i] = gain * place.of_row(args.row_weight, i, 0.0f);
        // A weight of 0 gets shift +inf, because 0 * exp(z - shift) may be NaN.
        shift[i] = weight[i] == 0 ? kInf : place.of_row(args.row_shift, i, kInf);
        entry[i] = gain * place.of_row(args.entry, i, 0.0f);
        q[i] = 0;
        if constexpr (Q) target_sim[i] = place.of_row(args.row_target_sim, i, 0.0f);
        if constexpr (GENERAL) smooth[i] = gain * place.of_row(args.smooth, i, 0.0f);
      }
    }
    FUSEDLOSS_INLINE bool by_columns() const { return COLUMNS && (!GENERAL || args.col_shift); }
    template <bool INNER>
    FUSEDLOSS_INLINE void columns(int j) {
      if (!by_columns()) return;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (INNER) {  // they are given
          col_weight[e] = gain * ptx::load(args.col_weight + place.col0 + place.offset(j + e));
          const float shift = ptx::load(args.col_shift + place.col0 + place.offset(j + e));
          col_shift[e] = col_weight[e] == 0 ? kInf : shift;
          if constexpr (Q) col_target_sim[e] = ptx::load(args.col_target_sim + place.col0 + place.offset(j + e));
        } else {
          col_weight[e] = gain * place.of_col(args.col_weight, j + e, 0.0f);
          col_shift[e] = col_weight[e] == 0 ? kInf : place.of_col(args.col_shift, j + e, kInf);
          if constexpr (Q) col_target_sim[e] = place.of_col(args.col_target_sim, j + e, 0.0f);
        }
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      float dz = weight[i] * exponential(element.z - shift[i]);
      if constexpr (Q) q[i] += dz * (element.sim - target_sim[i]);
      if (by_columns()) {
        const float p = col_weight[j % 2] * exponential(element.z - col_shift[j % 2]);
        dz += p;
        if constexpr (Q) q[i] += p * (element.sim - col_target_sim[j % 2]);
      }
      if constexpr (GENERAL) dz -= element.z > -kInf ? smooth[i] : 0.0f;
      return element.target ? entry[i] : dz;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, place);
    for_each_logit<GENERAL, Out>(acc, strip, place, visit);
    if constexpr (Q) {
      if (!GENERAL || args.q) {
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i) visit.q[i] /= visit.gain;  // a power of two
        rows_to_table<Sum>(visit.q, args.q, place, scratch);
      }
    }
  }
};

// Masks' own ----------------------------------------------------------------------------------------------------------

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
    for_each_logit<true, void>(acc, strip, place, visit);
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
                                   const Place<S>& place, typename S::Scratch&) {
    Visit<S> visit(args, place);
    for_each_logit<false, void, false>(acc, strip, place, visit);
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
                                   const Place<S>& place, typename S::Scratch&) {
    Visit<S> visit(args, place);
    for_each_logit<false, void>(acc, strip, place, visit);
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
                                   const Place<S>& place, typename S::Scratch&) {
    Visit<S> visit;
    for_each_logit<false, Out, false>(acc, strip, place, visit);
  }
};

// Positives and negatives ---------------------------------------------------------------------------------------------

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

// Folds: sums over a row's similarities v, and their derivative by v, times the row's weight --------------------------

enum class FoldKind { sigmoid, margin_ranking, pair_hinge };

template <FoldKind KIND>
struct Fold {
  using Args = FoldArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    float scale, bias;
    float weight[S::ROWS], target_value[S::ROWS];
    Relations<S> relations;
    float loss[S::ROWS], count[S::ROWS], scale_grad[S::ROWS];  // count: sigmoid's bias_grad

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place)
        : args(args), place(place), relations(args.row_labels, args.key_labels, args.own, place) {
      scale = ptx::load(strip.scale);
      bias = args.sigmoid_bias ? ptx::load(args.sigmoid_bias) : 0.0f;
      zero<S>(loss), zero<S>(count), zero<S>(scale_grad);
#pragma unroll
      for (int i = 0; i < S::ROWS; ++i) {
        weight[i] = place.of_row(args.weight, i, 0.0f);
        target_value[i] = place.of_row(args.target_value, i, 0.0f);
      }
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const float v = element.sim;
      const bool positive = relations.positive(i, j, element.target);
      const bool counts = relations.template counts<INNER>(i, j, place);
      if constexpr (KIND == FoldKind::sigmoid) {
        // log(1 + exp(-y z)), y = 1 for positives and -1 for negatives
        const float z = v * scale + bias, u = positive ? -z : z;
        const float e = exponential(-fabsf(u));
        const float p = (u < 0 ? e : 1.0f) * ptx::reciprocal(1 + e);
        const bool in = counts && weight[i] != 0;
        const float dz = in ? weight[i] * (positive ? -p : p) : 0.0f;
        loss[i] += in ? maximum(u, 0.0f) + log1p(e) : 0.0f;
        count[i] += dz;
        scale_grad[i] += in ? dz * v : 0.0f;
        return dz * scale;
      } else {
        // max(0, margin - v_t + v) of the negatives; max(0, sign (v - margin)) of the positives or the negatives
        const bool ranking = KIND == FoldKind::margin_ranking;
        const float hinge = ranking ? v - target_value[i] + args.margin : args.sign * (v - args.margin);
        const bool pays = counts && (ranking ? !element.target : positive == args.pulls) && !(hinge <= 0);
        loss[i] += pays ? hinge : 0.0f;
        count[i] += pays ? 1.0f : 0.0f;
        return pays ? (ranking ? weight[i] : weight[i] * args.sign) : 0.0f;
      }
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place);
    for_each_logit<false, Out, KIND == FoldKind::sigmoid>(acc, strip, place, visit);
    rows_to_table<Sum>(visit.loss, args.loss, place, scratch);
    rows_to_table<Sum>(visit.count, KIND == FoldKind::sigmoid ? args.bias_grad : args.count, place, scratch);
    if constexpr (KIND == FoldKind::sigmoid) rows_to_table<Sum>(visit.scale_grad, args.scale_grad, place, scratch);
  }
};

// Losses of two log-sum-exps of a row, of its positives' f(v) and of its negatives' -----------------------------------

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

// Maxima of f and sums of exp(f - maximum), of each side.
template <SideKind KIND>
struct SidesStats {
  using Args = SidesArgs;
  static constexpr bool NARROW = true;

  template <class S>
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    Relations<S> relations;
    float scale;
    float count[S::ROWS];  // of positives

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place)
        : args(args), place(place), relations(args.row_labels, args.key_labels, args.own, place) {
      scale = ptx::load(strip.scale);
      zero<S>(count);
    }
    template <bool INNER>
    FUSEDLOSS_INLINE float value(int i, int j, const Element& element) {
      const bool positive = relations.positive(i, j, element.target);
      const bool counts = relations.template counts<INNER>(i, j, place);
      float slope;
      const float f = side<KIND>(args, positive, element.sim, scale, slope);
      count[i] += counts && positive ? 1.0f : 0.0f;
      return counts ? f : -kInf;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place);
    for_each_logit<false, void, false>(acc, strip, place, visit);
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
  struct Visit : Visitor<S> {
    const Args& args;
    const Place<S>& place;
    Relations<S> relations;
    float scale;
    float shift[2][S::ROWS], weight[2][S::ROWS], q[S::ROWS];

    FUSEDLOSS_INLINE Visit(const Args& args, const Strip& strip, const Place<S>& place)
        : args(args), place(place), relations(args.row_labels, args.key_labels, args.own, place) {
      scale = ptx::load(strip.scale);
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
      const bool positive = relations.positive(i, j, element.target);
      float slope;
      const float f = side<KIND>(args, positive, element.sim, scale, slope);
      const float e = exponential(f - (positive ? shift[1][i] : shift[0][i]));
      const float own = positive ? weight[1][i] : weight[0][i];
      const bool counts = relations.template counts<INNER>(i, j, place) && own != 0;
      const float d = counts ? own * e : 0.0f;
      q[i] += counts ? d * element.sim : 0.0f;
      return counts ? d * slope : 0.0f;
    }
  };

  template <class Out, class S>
  static FUSEDLOSS_INLINE void run(float (&acc)[S::MT][S::NT][4], const Strip& strip, const Args& args,
                                   const Place<S>& place, typename S::Scratch& scratch) {
    Visit<S> visit(args, strip, place);
    for_each_logit<false, Out, false>(acc, strip, place, visit);
    rows_to_table<Sum>(visit.q, args.q, place, scratch);
  }
};

// What an epilogue that stores stores.
template <class Epilogue, class T>
struct OutOf {
  using type = T;
};
template <class T>
struct OutOf<Store, T> {
  using type = float;
};

// The whole of what happens to a tile. `thread` counts within the shape's warps, `pid_m` in tiles of S::BLOCK_M rows.
template <class Epilogue, class T, class S>
FUSEDLOSS_INLINE void fold(float (&acc)[S::MT][S::NT][4], const Strip& strip, const typename Epilogue::Args& args,
                           int pid_m, int pid_n, int thread, void* scratch) {
  const Place<S> place(strip, pid_m, pid_n, thread);
  place.sync();  // scratch may still be read: by the products as their shared memory, or for the tile before
  Epilogue::template run<typename OutOf<Epilogue, T>::type>(acc, strip, args, place,
                                                            *static_cast<typename S::Scratch*>(scratch));
}

}  // namespace fusedloss
