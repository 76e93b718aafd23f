// The similarity GEMM on sm_90a: operands by the tensor memory accelerator, products of whole warpgroups, and a fold of
// the accumulators while they are in registers. What the numbers below come from: docs/performance-notes.md.
//
// A persistent block has three warpgroups. One thread of the first loads; the other two multiply 64 of the tile's 128
// rows each, with the same stages of y: from L2 that is 48 bytes a clock at the full rate, where two tiles of 64 rows
// would take 80. Each has its half of the tile in 128 registers a thread, and while one folds the other multiplies
// (sm90::consume).
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "epilogues.cuh"
#include "ptx.cuh"
#include "similarity.h"
#include "sm90.h"

namespace fusedloss {

// CLUSTER blocks, side by side along M, share y: each loads its part of a tile into all of them.
template <class T, int BLOCK_N_, int CLUSTER_>
struct Sm90 {
  static_assert(BLOCK_N_ == 128 || BLOCK_N_ == 256);
  static_assert(CLUSTER_ == 1 || CLUSTER_ == 2);
  static constexpr int BLOCK_N = BLOCK_N_, CLUSTER = CLUSTER_;
  static constexpr int kWarpgroup = 128;                 // threads
  static constexpr int kRows = 64;                       // of a consumer
  static constexpr int BLOCK_M = 2 * kRows;
  static constexpr int BLOCK_D = sm90::kRowBytes / sizeof(T);
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int GROUP_M = 8 / CLUSTER;            // of CLUSTER * BLOCK_M rows

  // 192 KiB of stages leave 35 of the 227 that a block may have.
  static constexpr int kXBytes = BLOCK_M * sm90::kRowBytes, kYBytes = BLOCK_N * sm90::kRowBytes;
  static constexpr int kStageBytes = kXBytes + kYBytes;
  static constexpr int kStages = (192 << 10) / kStageBytes;  // 8 of 24 KiB, 12 of 16
  // A stage that the leader needs next was let go by the follower two stages or more before, which is what its load
  // takes. With stages of twice the bytes the lead would shrink to one: docs/performance-notes.md.
  static constexpr int kLead = kStages * 3 / 4;
  static constexpr int kScratchBytes = 16 << 10;         // for each consumer's fold
  static constexpr int kScratch = kStages * kStageBytes;
  static constexpr int kBarriers = kScratch + 2 * kScratchBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kXBytes % sm90::kAtomBytes == 0 && kYBytes / CLUSTER % sm90::kAtomBytes == 0, "tiles start on atoms");
  static_assert(kSharedBytes <= 227 << 10);

  // Every consumer warp lets go for itself, at every block that loads for it: that all four warps of a warpgroup are
  // done when one is, the ISA does not say.
  static constexpr int kReleases = 2 * 4 * CLUSTER;
  // Named barriers; the whole block's is 0. Consumers fold at 1 and 2, by the parity of their row tile.
  static constexpr int kFoldBarrier = 1;
  static constexpr int kMeeting = 3;

  // 168 registers a thread are 64512 when the block starts, since __launch_bounds__ lets ptxas have 65536 / 384. The
  // consumers wait for what the producer gives back: its sum must not be larger.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace sm90 {

// A block's tiles, in the order that all of its warpgroups, and all blocks of a cluster, walk them.
template <class Config>
struct Tiles {
  int m_tiles, n_tiles;  // m in clusters

  __device__ __forceinline__ explicit Tiles(const Strip& strip)
      : m_tiles((strip.M - 1) / (Config::CLUSTER * Config::BLOCK_M) + 1),
        n_tiles((strip.N - 1) / Config::BLOCK_N + 1) {}

  // visit(tile_m, tile_n). A cluster's last blocks may have tiles below the matrix: all of it 0, and not folded.
  template <class Visit>
  __device__ __forceinline__ void each(int rank, Visit&& visit) const {
    const int tiles = m_tiles * n_tiles, step = ptx::blocks_x() / Config::CLUSTER;
    for (int tile = ptx::block_x() / Config::CLUSTER; tile < tiles; tile += step) {
      const Place at = place(tile, m_tiles, n_tiles, Config::GROUP_M);
      visit(at.m * Config::CLUSTER + rank, at.n);
    }
  }
};

template <class Config>
struct Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int stage) const { return base + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + (Config::kStages + stage) * 8; }
};

template <class Config>
struct ProducerOps {
  const CUtensorMap *map_x, *map_y;
  uint32_t stages;  // shared memory
  Barriers<Config> barriers;
  int rank, row_x, row_y;

  __device__ __forceinline__ void wait_empty(int stage, uint32_t phase) {
    ptx::mbarrier_wait(barriers.empty(stage), phase);
  }
  // `empty` counts the consumers of the whole cluster, so that the part of y that goes to the other block finds its
  // stage free there, too. It may land before that block expects it: a count below 0 does not end a phase whose arrival
  // is missing. Boxes that stick out count in full.
  __device__ __forceinline__ void load(int stage, int step) {
    const uint32_t x = stages + stage * Config::kStageBytes, y = x + Config::kXBytes, full = barriers.full(stage);
    const int column = step * Config::BLOCK_D;
    ptx::mbarrier_expect(full, Config::kStageBytes);
    ptx::tma_load(x, map_x, column, row_x, full);
    if constexpr (Config::CLUSTER == 1) {
      ptx::tma_load(y, map_y, column, row_y, full);
    } else {
      constexpr int kPart = Config::BLOCK_N / Config::CLUSTER;
      ptx::tma_load_multicast(y + rank * kPart * kRowBytes, map_y, column, row_y + rank * kPart, full,
                              (1 << Config::CLUSTER) - 1);
    }
  }
};

template <class Config, class T>
struct ConsumerOps {
  float (&acc)[Config::BLOCK_N / 8][4];
  uint64_t x, y;  // of stage 0
  Barriers<Config> barriers;
  int lane;

  __device__ __forceinline__ void wait_full(int stage, uint32_t phase) {
    ptx::mbarrier_wait(barriers.full(stage), phase);
  }
  __device__ __forceinline__ void multiply_first(int stage) { issue<true>(stage); }
  __device__ __forceinline__ void multiply(int stage) { issue<false>(stage); }
  // The first product of a tile overwrites the accumulators. Zeroing them would take 128 instructions; a flag in place
  // of an instance of its own would read what the tile before left there, and keep 128 registers from its fold.
  // The fence orders the products behind the fold, which read the accumulators. The operands need none: they come by
  // the proxy that reads them here.
  template <bool FIRST>
  __device__ __forceinline__ void issue(int stage) {
    const uint64_t stage_x = advance(x, stage * Config::kStageBytes), stage_y = advance(y, stage * Config::kStageBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t bytes = 0; bytes < kRowBytes; bytes += kStepBytes) {
      if (FIRST && bytes == 0) {
        ptx::wgmma_first(T{}, acc, stage_x, stage_y);
      } else {
        ptx::wgmma(T{}, acc, advance(stage_x, bytes), advance(stage_y, bytes));
      }
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void all_but_one_done() { ptx::wgmma_wait<1>(); }
  __device__ __forceinline__ void all_done() {
    ptx::wgmma_wait<0>();
    ptx::wgmma_done(acc);
  }
  __device__ __forceinline__ void release(int stage) {
    if constexpr (Config::CLUSTER == 1) {
      if (lane == 0) ptx::mbarrier_arrive(barriers.empty(stage));
    } else {
      if (lane < Config::CLUSTER) ptx::mbarrier_arrive(barriers.empty(stage), lane);
    }
  }
  __device__ __forceinline__ void meet() { ptx::sync_named(Config::kMeeting, 2 * Config::kWarpgroup); }
};

// Both consumers run the same code, which is mostly the fold's: twice it would not fit the instruction cache.
template <class Config, class T, class Epilogue>
__device__ __forceinline__ void consumer(const Strip& strip, const typename Epilogue::Args& args, unsigned char* shared,
                                         Barriers<Config> barriers, int rank, int steps, int index) {
  constexpr int kTiles = Config::BLOCK_N / 8;
  using Tile = Shape<1, kTiles, 4, 1, Config::kFoldBarrier>;
  static_assert(sizeof(typename Tile::Scratch) <= Config::kScratchBytes);
  const int thread = ptx::thread() % Config::kWarpgroup;
  const uint32_t stages = ptx::shared_address(shared);
  auto& scratch = *reinterpret_cast<typename Tile::Scratch*>(shared + Config::kScratch + index * Config::kScratchBytes);
  auto ring = Ring<Config::kStages>::consumer();
  Tiles<Config>(strip).each(rank, [&](int tile_m, int tile_n) {
    float acc[1][kTiles][4];
    const int pid_m = 2 * tile_m + index;
    fusedloss::Place<Tile> place(strip, pid_m, tile_n, thread);
    place.read_rows(strip);
    const Ahead<Epilogue, Tile> ahead(strip, args, place);
    place.sync();  // behind the fold before, which reads what `ahead` overwrites
    ConsumerOps<Config, T> ops{acc[0], descriptor(stages + index * Config::kRows * kRowBytes),
                               descriptor(stages + Config::kXBytes), barriers, thread % 32};
    consume<Config::kLead>(ring, steps, index == 0, ops);
    // A table by column has cdiv(M, 64) lines.
    if (pid_m <= (strip.M - 1) / Config::kRows) {
      ahead.lay(place, scratch);
      fold<Epilogue, T, Tile>(acc, strip, args, place, &scratch);
    }
  });
}

}  // namespace sm90

#endif  // sm_90a

template <class T, class Epilogue, int BLOCK_N, int CLUSTER = 1>
__global__ void __launch_bounds__(3 * 128, 1)
    similarity_sm90(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                    const __grid_constant__ Strip strip, const __grid_constant__ typename Epilogue::Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Config = Sm90<T, BLOCK_N, CLUSTER>;
  unsigned char* const shared = ptx::shared_memory();
  const uint32_t stages = ptx::shared_address(shared);
  const sm90::Barriers<Config> barriers{stages + Config::kBarriers};
  const int rank = CLUSTER == 1 ? 0 : int(ptx::cluster_rank());
  const int steps = (strip.D - 1) / Config::BLOCK_D + 1;

  if (ptx::thread() == 0) {
    if (stages % sm90::kAtomBytes != 0) ptx::trap();
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(barriers.full(stage), 1);
      ptx::mbarrier_init(barriers.empty(stage), Config::kReleases);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_tensormap(&map_x);
    ptx::prefetch_tensormap(&map_y);
  }
  if constexpr (CLUSTER == 1) {
    ptx::sync();
  } else {
    ptx::cluster_sync();  // nobody loads into a block, or lets go of its stages, before its barriers are there
  }

  const int warpgroup = ptx::uniform(ptx::thread() / Config::kWarpgroup);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (ptx::uniform(ptx::thread() / 32) == 0 && ptx::elect_one()) {
      auto ring = sm90::Ring<Config::kStages>::producer();
      sm90::Tiles<Config>(strip).each(rank, [&](int tile_m, int tile_n) {
        sm90::ProducerOps<Config> ops{&map_x, &map_y, stages, barriers, rank, tile_m * Config::BLOCK_M,
                                      tile_n * Config::BLOCK_N};
        sm90::produce(ring, steps, ops);
      });
    }
    ptx::sync_warp();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    sm90::consumer<Config, T, Epilogue>(strip, args, shared, barriers, rank, steps, warpgroup - 1);
  }
  // Every load was waited for, so that none is under way when the block ends. A cluster's other block may still have to
  // let go of a stage here.
  if constexpr (CLUSTER > 1) ptx::cluster_sync();
#else
  ptx::trap();  // for another architecture: launch_sm90 is not called there
#endif
}

// cuTensorMapEncodeTiled of the driver that is loaded: libcuda is not linked, so that the extension imports without it.
inline PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static std::atomic<PFN_cuTensorMapEncodeTiled_v12000> known{nullptr};  // a failure is asked about again
  if (const auto encode = known.load()) return encode;
  const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  known = encode;
  return encode;
}

// Boxes of box_rows rows and 64 bytes of the columns.
template <class T>
cudaError_t encode_rows(CUtensorMap* map, const void* matrix, int rows, int columns, int64_t stride, int box_rows) {
  const auto encode = encode_tiled();
  if (!encode) return cudaErrorNotSupported;
  // fp32 is rounded to tf32 on its way. 16-bit numbers are moved as bits.
  constexpr auto kType =
      std::is_same_v<T, float> ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  // A single row may have any stride.
  const cuuint64_t strides[] = {rows == 1 ? (columns * sizeof(T) + 15) / 16 * 16 : cuuint64_t(stride) * sizeof(T)};
  const cuuint32_t box[] = {cuuint32_t(sm90::kRowBytes / sizeof(T)), cuuint32_t(box_rows)};
  const cuuint32_t every[] = {1, 1};
  const CUresult result =
      encode(map, kType, 2, const_cast<void*>(matrix), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Whether the accelerator can load x and y: rows of unit stride that start at multiples of 16 bytes.
template <class T>
bool loads_sm90(const Strip& s) {
  const auto rows = [&](const void* matrix, int rows, int64_t stride_row, int64_t stride_column) {
    return (s.D == 1 || stride_column == 1) && reinterpret_cast<uintptr_t>(matrix) % 16 == 0 &&
           (rows == 1 || (stride_row > 0 && stride_row * int64_t(sizeof(T)) % 16 == 0 &&
                          stride_row < (int64_t(1) << 40) / int64_t(sizeof(T))));
  };
  return rows(s.x, s.M, s.stride_xm, s.stride_xd) && rows(s.y, s.N, s.stride_yn, s.stride_yd);
}

// cudaErrorInvalidValue where the accelerator cannot load the operands, or where there are more than 2^30 rows, columns
// or tiles, which are counted in 32 bits. Asynchronous on `stream`, which must belong to the current device, an sm_90.
template <class T, class Epilogue, int BLOCK_N, int CLUSTER = 1>
cudaError_t launch_sm90(const Strip& strip, const typename Epilogue::Args& args, int multiprocessors,
                        cudaStream_t stream) {
  using Config = Sm90<T, BLOCK_N, CLUSTER>;
  constexpr int kMost = 1 << 30;
  if (strip.M < 1 || strip.N < 1 || strip.D < 1 || std::max({strip.M, strip.N, strip.D}) > kMost ||
      !loads_sm90<T>(strip) || (std::is_same_v<T, float> && !strip.tensor_cores)) {
    return cudaErrorInvalidValue;
  }
  const int64_t m_tiles = (strip.M - 1) / (CLUSTER * Config::BLOCK_M) + 1, n_tiles = (strip.N - 1) / BLOCK_N + 1;
  if (m_tiles * n_tiles > kMost) return cudaErrorInvalidValue;
  const int clusters = int(std::min<int64_t>(m_tiles * n_tiles, std::max(multiprocessors / CLUSTER, 1)));

  const auto kernel = similarity_sm90<T, Epilogue, BLOCK_N, CLUSTER>;
  CUtensorMap map_x, map_y;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error == cudaSuccess) {
    error = encode_rows<T>(&map_x, strip.x, strip.M, strip.D, strip.stride_xm, Config::BLOCK_M);
  }
  if (error == cudaSuccess) {
    error = encode_rows<T>(&map_y, strip.y, strip.N, strip.D, strip.stride_yn, BLOCK_N / CLUSTER);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // or else the next launch would report it once more
    return error;
  }

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * CLUSTER);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1;
  error = cudaLaunchKernelEx(&config, kernel, map_x, map_y, strip, args);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace fusedloss
