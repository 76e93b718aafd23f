// Where a thread's elements are: the shape of a tile, and a thread's place in one.
//
// A thread holds its part of a tile as mma.m16n8 fragments do, which is also how wgmma.m64 lays them out: lane 4 g + t
// has rows g and g + 8 and columns 2 t and 2 t + 1 of each.
#pragma once

#include <cstdint>

#include "../ptx.cuh"
#include "../similarity.h"

namespace fusedloss {

constexpr int kGroup = 4;  // fragments side by side: 32 columns, 8 of them a thread's

// WARPS_M x WARPS_N warps, each with MT x NT fragments. BARRIER: 0 where they are the whole block, else the first of
// two named barriers: a warpgroup takes the one of its row tile's parity.
template <int MT_, int NT_, int WARPS_M_, int WARPS_N_, int BARRIER_ = 0>
struct Shape {
  static constexpr int MT = MT_, NT = NT_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, BARRIER = BARRIER_;
  static constexpr int BLOCK_M = 16 * MT * WARPS_M, BLOCK_N = 8 * NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int ROWS = 2 * MT, COLUMNS = 2 * NT;  // of one thread
  static constexpr bool WARPGROUP = BARRIER != 0;  // of sm_90
  static_assert(NT % kGroup == 0, "columns are stored and summed 32 at a time");

  using Accumulators = float[MT][NT][4];

  struct Scratch {
    // Where the parts of a row, and of a column, meet that several warps hold.
    float row[2][WARPS_N][BLOCK_M];
    float col[2][WARPS_M][BLOCK_N];
    // Where a warp turns 32 columns of 16-bit numbers into rows, 8 rows at a time: 64 bytes of each.
    Vector16 rows[WARPS_M * WARPS_N][ROWS][32];
    float factor[BLOCK_N];  // of the columns, on sm_90
  };
};

template <class S>
FUSEDLOSS_INLINE float& at(float (&acc)[S::MT][S::NT][4], int i, int j) {
  return acc[i / 2][j / 2][2 * (i % 2) + j % 2];
}

template <class S>
FUSEDLOSS_INLINE void zero(float (&v)[S::ROWS]) {
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) v[i] = 0;
}

template <class S>
struct Place {
  int pid_m, pid_n, thread, M, N;
  int t, g, warp_m, warp_n;
  int row0, col0;  // of the thread's first row and column
  float row_factor[S::ROWS];  // by read_rows
  int target[S::ROWS];        // as hit() says

  FUSEDLOSS_INLINE Place(const Strip& strip, int pid_m, int pid_n, int thread)
      : pid_m(pid_m), pid_n(pid_n), thread(thread), M(strip.M), N(strip.N) {
    t = thread % 4, g = thread % 32 / 4, warp_m = thread / 32 / S::WARPS_N, warp_n = thread / 32 % S::WARPS_N;
    row0 = pid_m * S::BLOCK_M + local_row(0);
    col0 = pid_n * S::BLOCK_N + warp_n * 8 * S::NT + 2 * t;
  }
  // What every walk asks of its rows, and what decides whether a tile is an inner one: on sm_90 before the products.
  FUSEDLOSS_INLINE void read_rows(const Strip& strip) {
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
      row_factor[i] = of_row(strip.row_factor, i, 1.0f);
      target[i] = hit(strip.target, i);
    }
  }
  FUSEDLOSS_INLINE int local_row(int i) const { return warp_m * 16 * S::MT + g + 16 * (i / 2) + 8 * (i % 2); }
  FUSEDLOSS_INLINE int row(int i) const { return row0 + 16 * (i / 2) + 8 * (i % 2); }
  FUSEDLOSS_INLINE static constexpr int offset(int j) { return 8 * (j / 2) + j % 2; }
  FUSEDLOSS_INLINE int col(int j) const { return col0 + offset(j); }
  FUSEDLOSS_INLINE int local_col(int j) const { return warp_n * 8 * S::NT + 2 * t + offset(j); }
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
  // The same of a row and of a column of the tile.
  FUSEDLOSS_INLINE float of_local_row(const float* vector, int i, float other) const {
    const int row = pid_m * S::BLOCK_M + i;
    return vector && row < M ? ptx::load(vector + row) : other;
  }
  FUSEDLOSS_INLINE float of_local_col(const float* vector, int j, float other) const {
    const int col = pid_n * S::BLOCK_N + j;
    return vector && col < N ? ptx::load(vector + col) : other;
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

}  // namespace fusedloss
