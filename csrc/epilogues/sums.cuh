// Sums and maxima over the threads and warps that share a row or a column, and the tables that they go to.
#pragma once

#include "math.cuh"
#include "tile.cuh"

namespace fusedloss {

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

// What warps left in scratch.col, into line pid_m of tables [m_tiles, N]. SUMS: merges maxima and sums; or else both
// are sums, and the second table may be null.
template <bool SUMS, class S>
FUSEDLOSS_INLINE void columns_to_table(float* table, float* sums, const Place<S>& place,
                                       typename S::Scratch& scratch) {
  place.sync();
  for (int c = place.thread; c < S::BLOCK_N; c += S::THREADS) {
    const int col = place.pid_n * S::BLOCK_N + c;
    if (col >= place.N) break;
    float first = scratch.col[0][0][c], sum = SUMS || sums ? scratch.col[1][0][c] : 0.0f;
#pragma unroll
    for (int w = 1; w < S::WARPS_M; ++w) {
      if constexpr (SUMS) {
        merge(first, sum, scratch.col[0][w][c], scratch.col[1][w][c]);
      } else {
        first += scratch.col[0][w][c];
        if (sums) sum += scratch.col[1][w][c];
      }
    }
    table[int64_t(place.pid_m) * place.N + col] = first;
    if (SUMS || sums) sums[int64_t(place.pid_m) * place.N + col] = sum;
  }
  place.sync();
}

}  // namespace fusedloss
