// The similarity GEMM for sm_80 and up: cp.async into swizzled shared memory, ldmatrix, mma.sync, an epilogue.
//
// A block computes 128 x 128 similarities with 8 warps of 32 x 64, 128 bytes of D at a time: 32 KiB a stage, of which
// three fit the 99 KiB that sm_86, sm_89 and sm_120 have. Operands may have any strides with a unit one in either
// dimension: a tile lies in shared memory as it does in global memory, with its unit stride inside.
#pragma once

#include "epilogues.cuh"
#include "launch.h"

namespace fusedloss::sm80 {

using Tile = Shape<2, 8, 4, 2>;

constexpr int kStages = 3;
constexpr int kTileBytes = 128 * 128;  // of one operand
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kGroupM = 8;  // row tiles that walk the columns together: x stays in L2, a y tile is fetched once for all
static_assert(Tile::BLOCK_M == 128 && Tile::BLOCK_N == 128 && sizeof(Tile::Scratch) <= kSharedBytes);

// How an operand [rows, D] lies in memory.
struct Layout {
  const char* base;
  int64_t stride;  // bytes between lines; a line has unit stride
  int lines, length;  // of the matrix, length in elements
  bool by_row;        // a line is a row, else a column
  bool aligned;       // lines start at multiples of 16 bytes
};

template <class T>
inline Layout layout_of(const void* base, int rows, int D, int64_t stride_row, int64_t stride_d) {
  const bool by_row = stride_d == 1 || D == 1;
  const int64_t stride = (by_row ? stride_row : stride_d) * int64_t(sizeof(T));
  const int lines = by_row ? rows : D;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && (stride % 16 == 0 || lines == 1);
  return {static_cast<const char*>(base), stride, lines, by_row ? D : rows, by_row, aligned};
}

// Where 16 bytes lie: line-major, chunks permuted by the line so that the eight lines of a fragment, which have the
// same chunk, meet all 32 banks. A line is 128 bytes of D, or 128 rows.
template <int CHUNKS>
FUSEDLOSS_INLINE int swizzled(int line, int chunk) {
  return (line * CHUNKS + (chunk ^ (line & 7))) * 16;
}

template <class T>
struct Block {
  static constexpr int D = 128 / int(sizeof(T));  // elements of D a stage
  static constexpr int WIDE = 16 / int(sizeof(T));
  static constexpr int COLUMN_CHUNKS = 128 / WIDE;  // of a line of 128 rows
};

// One operand's tile of a stage: LINES of CHUNKS x 16 bytes, from line0 and the element first0 of each.
template <class T, int LINES, int CHUNKS, bool ANY>
FUSEDLOSS_INLINE void load_tile(unsigned char* tile, const Layout& layout, int line0, int first0) {
  constexpr int kSize = int(sizeof(T)), kWide = 16 / kSize;
  static_assert(LINES * CHUNKS * 16 == kTileBytes);
  [[maybe_unused]] constexpr int kUnrolled = ANY ? 1 : kTileBytes / 16 / Tile::THREADS;
#pragma unroll kUnrolled
  for (int c = ptx::thread(); c < LINES * CHUNKS; c += Tile::THREADS) {
    const int line = c / CHUNKS, chunk = c % CHUNKS, first = first0 + chunk * kWide;
    const int left = layout.length - first;
    const int count = line0 + line < layout.lines && left > 0 ? (left < kWide ? left : kWide) : 0;
    // Nothing is read of a chunk outside; its address must be one all the same.
    const char* source =
        count > 0 ? layout.base + (line0 + line) * layout.stride + int64_t(first) * kSize : layout.base;
    unsigned char* place = tile + swizzled<CHUNKS>(line, chunk);
    if (!ANY || layout.aligned) {
      ptx::cp_async16(ptx::shared_address(place), source, count * kSize);
    } else {
      alignas(16) T chunk_of[kWide];
#pragma unroll
      for (int k = 0; k < kWide; ++k) chunk_of[k] = k < count ? ptx::load(reinterpret_cast<const T*>(source) + k) : T{};
      *reinterpret_cast<Vector16*>(place) = *reinterpret_cast<const Vector16*>(chunk_of);
    }
  }
}

template <class T, bool ANY>
FUSEDLOSS_INLINE void load_operand(unsigned char* tile, const Layout& layout, int row0, int d0) {
  if (!ANY || layout.by_row) {
    load_tile<T, 128, 8, ANY>(tile, layout, row0, d0);
  } else {
    load_tile<T, Block<T>::D, Block<T>::COLUMN_CHUNKS, ANY>(tile, layout, d0, row0);
  }
}

// The four registers of 16 rows x 32 bytes of D, in the order low rows, high rows, and again for the second 16 bytes:
// a fragment of x. Of y, rows are columns of the product: BY_D_FIRST is the order of two fragments' two registers each.
template <class T, bool ANY, bool BY_D_FIRST>
FUSEDLOSS_INLINE void fragment(uint32_t (&r)[4], const unsigned char* tile, bool by_row, int row, int step) {
  const int lane = ptx::thread() % 32, matrix = lane / 8;
  const int row_half = BY_D_FIRST ? matrix / 2 : matrix % 2, d_half = BY_D_FIRST ? matrix % 2 : matrix / 2;
  if (!ANY || by_row) {
    ptx::ldmatrix(r, ptx::shared_address(tile + swizzled<8>(row + 8 * row_half + lane % 8, 2 * step + d_half)));
    return;
  }
  if constexpr (sizeof(T) == 2) {
    const int line = 16 * step + 8 * d_half + lane % 8, chunk = row / 8 + row_half;
    ptx::ldmatrix_trans(r, ptx::shared_address(tile + swizzled<Block<T>::COLUMN_CHUNKS>(line, chunk)));
  } else {  // ldmatrix.trans moves 16 bits
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int rows = row + 8 * (BY_D_FIRST ? k / 2 : k % 2) + lane / 4;
      const int line = 8 * step + 4 * (BY_D_FIRST ? k % 2 : k / 2) + lane % 4;
      const unsigned char* chunk = tile + swizzled<Block<T>::COLUMN_CHUNKS>(line, rows / 4);
      r[k] = reinterpret_cast<const uint32_t*>(chunk)[rows % 4];
    }
  }
}

// A stage by the tensor cores: 32 bytes of D at a step.
template <class T, bool ANY>
struct TensorCores {
  static FUSEDLOSS_INLINE void stage(Tile::Accumulators& acc, const unsigned char* x, const unsigned char* y,
                                     const Layout& x_layout, const Layout& y_layout, int row0, int col0) {
    // tf32 by columns is read word by word: four steps' addresses at once spill 24 bytes.
    [[maybe_unused]] constexpr int kUnrolled = ANY && sizeof(T) == 4 ? 1 : 4;
#pragma unroll kUnrolled
    for (int step = 0; step < 4; ++step) {
      uint32_t a[Tile::MT][4], b[Tile::NT][2];
#pragma unroll
      for (int mt = 0; mt < Tile::MT; ++mt) fragment<T, ANY, false>(a[mt], x, x_layout.by_row, row0 + 16 * mt, step);
#pragma unroll
      for (int nt = 0; nt < Tile::NT; nt += 2) {
        uint32_t pair[4];
        fragment<T, ANY, true>(pair, y, y_layout.by_row, col0 + 8 * nt, step);
        b[nt][0] = pair[0], b[nt][1] = pair[1], b[nt + 1][0] = pair[2], b[nt + 1][1] = pair[3];
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int mt = 0; mt < Tile::MT; ++mt) {
#pragma unroll
          for (int k = 0; k < 4; ++k) a[mt][k] = ptx::to_tf32(a[mt][k]);
        }
#pragma unroll
        for (int nt = 0; nt < Tile::NT; ++nt) b[nt][0] = ptx::to_tf32(b[nt][0]), b[nt][1] = ptx::to_tf32(b[nt][1]);
      }
#pragma unroll
      for (int mt = 0; mt < Tile::MT; ++mt) {
#pragma unroll
        for (int nt = 0; nt < Tile::NT; ++nt) ptx::mma(T{}, acc[mt][nt], a[mt], b[nt]);
      }
    }
  }
};

// A stage in full fp32, into the same fragments: 4 rows times 16 columns a thread, 16 bytes of D at a time. Of any
// layout, without an instance of its own: 256 FMAs hide the branch.
struct FullPrecision {
  static FUSEDLOSS_INLINE void four(float (&v)[4], const unsigned char* tile, bool by_row, int row, int chunk) {
    if (by_row) {
      const Vector16 words = *reinterpret_cast<const Vector16*>(tile + swizzled<8>(row, chunk));
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = ptx::bits_to_float(words.word[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        v[k] = reinterpret_cast<const float*>(tile + swizzled<32>(4 * chunk + k, row / 4))[row % 4];
      }
    }
  }

  static FUSEDLOSS_INLINE void stage(Tile::Accumulators& acc, const unsigned char* x, const unsigned char* y,
                                     const Layout& x_layout, const Layout& y_layout, int row0, int col0) {
    const int lane = ptx::thread() % 32;
#pragma unroll 1
    for (int chunk = 0; chunk < 8; ++chunk) {
      float rows[Tile::ROWS][4];
#pragma unroll
      for (int i = 0; i < Tile::ROWS; ++i) {
        four(rows[i], x, x_layout.by_row, row0 + 16 * (i / 2) + 8 * (i % 2) + lane / 4, chunk);
      }
#pragma unroll
      for (int j = 0; j < Tile::COLUMNS; ++j) {
        float column[4];
        four(column, y, y_layout.by_row, col0 + 8 * (j / 2) + 2 * (lane % 4) + j % 2, chunk);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < Tile::ROWS; ++i) at<Tile>(acc, i, j) += rows[i][k] * column[k];
        }
      }
    }
  }
};

// acc = x @ y.T of a tile. Stages go around a ring: the copy into a stage starts right after the barrier behind which
// everybody has left it.
template <class T, class Multiply, bool ANY>
FUSEDLOSS_INLINE void multiply(Tile::Accumulators& acc, const Layout& x, const Layout& y, int D, int row0, int col0,
                               unsigned char* shared) {
  const int warp = ptx::thread() / 32;
  const int warp_row = warp / Tile::WARPS_N * 16 * Tile::MT, warp_col = warp % Tile::WARPS_N * 8 * Tile::NT;
  const int blocks = (D + Block<T>::D - 1) / Block<T>::D;
  const auto fetch = [&](int k) {
    if (k < blocks) {
      unsigned char* stage = shared + k % kStages * kStageBytes;
      load_operand<T, ANY>(stage, x, row0, k * Block<T>::D);
      load_operand<T, ANY>(stage + kTileBytes, y, col0, k * Block<T>::D);
    }
    ptx::cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll
  for (int k = 0; k < kStages - 1; ++k) fetch(k);
#pragma unroll 1
  for (int k = 0; k < blocks; ++k) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync();
    fetch(k + kStages - 1);
    const unsigned char* stage = shared + k % kStages * kStageBytes;
    Multiply::stage(acc, stage, stage + kTileBytes, x, y, warp_row, warp_col);
  }
  ptx::cp_async_wait<0>();
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS, 1)  // or else ptxas spills for a second block, which does not fit
    similarity_sm80(const Strip strip, const typename Epilogue::Args args, const Layout x, const Layout y) {
  unsigned char* shared = ptx::shared_memory();
  const int m_tiles = (strip.M + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  const int n_tiles = (strip.N + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
  const int group = ptx::block_x() / (kGroupM * n_tiles), first_m = group * kGroupM;
  const int in_group = ptx::block_x() - group * kGroupM * n_tiles;
  const int rows_in_group = m_tiles - first_m < kGroupM ? m_tiles - first_m : kGroupM;
  const int pid_m = first_m + in_group % rows_in_group, pid_n = in_group / rows_in_group;

  Tile::Accumulators acc = {};
  const int row0 = pid_m * Tile::BLOCK_M, col0 = pid_n * Tile::BLOCK_N;
  const bool plain = x.by_row && x.aligned && y.by_row && y.aligned;
  if constexpr (sizeof(T) == 4) {
    if (!strip.tensor_cores) multiply<T, FullPrecision, true>(acc, x, y, strip.D, row0, col0, shared);
  }
  if (sizeof(T) == 2 || strip.tensor_cores) {
    if (plain) {
      multiply<T, TensorCores<T, false>, false>(acc, x, y, strip.D, row0, col0, shared);
    } else {
      multiply<T, TensorCores<T, true>, true>(acc, x, y, strip.D, row0, col0, shared);
    }
  }
  fold<Epilogue, T, Tile>(acc, strip, args, pid_m, pid_n, ptx::thread(), shared);
}

template <class T, class Epilogue>
cudaError_t launch_similarity(const Strip& strip, const typename Epilogue::Args& args, cudaStream_t stream) {
  const int64_t m_tiles = (int64_t(strip.M) + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  const int64_t n_tiles = (int64_t(strip.N) + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
  if (m_tiles * n_tiles == 0) return cudaSuccess;  // a grid of 0 blocks is an error
  // Rows, columns and features are counted in 32 bits, a tile beyond the last.
  const int most = 0x7fffff00;
  if (m_tiles * n_tiles > most || strip.M > most || strip.N > most || strip.D > most) return cudaErrorInvalidValue;
  const Layout x = layout_of<T>(strip.x, strip.M, strip.D, strip.stride_xm, strip.stride_xd);
  const Layout y = layout_of<T>(strip.y, strip.N, strip.D, strip.stride_yn, strip.stride_yd);
  return launch(similarity_sm80<T, Epilogue>, dim3(unsigned(m_tiles * n_tiles)), Tile::THREADS, kSharedBytes, stream,
                strip, args, x, y);
}

}  // namespace fusedloss::sm80
