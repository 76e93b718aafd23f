// Every instruction that C++ has no word for, a function each, named after the PTX ISA. Nothing else in csrc/ holds
// assembly or an intrinsic, so that a second implementation of this one header, tests/host/ptx_host.h, lets the kernels
// run on a CPU.
#pragma once

#include <cstdint>

#include "types.h"

#ifdef FUSEDLOSS_HOST
#include "ptx_host.h"
#else

#include <cuda_runtime.h>

#define FUSEDLOSS_INLINE __device__ __forceinline__

namespace fusedloss::ptx {

constexpr unsigned kWarp = 0xffffffffu;

// Threads -------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE int thread() { return int(threadIdx.x); }  // blocks are one-dimensional
FUSEDLOSS_INLINE int block_x() { return int(blockIdx.x); }
FUSEDLOSS_INLINE int block_y() { return int(blockIdx.y); }
FUSEDLOSS_INLINE int blocks_x() { return int(gridDim.x); }
FUSEDLOSS_INLINE int blocks_y() { return int(gridDim.y); }

FUSEDLOSS_INLINE void sync() { __syncthreads(); }
FUSEDLOSS_INLINE void sync_warp() { __syncwarp(); }
// Of `threads` threads, a multiple of 32, that agree on one of the barriers 1 to 15.
FUSEDLOSS_INLINE void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Ends the kernel with an error.
FUSEDLOSS_INLINE void trap() { asm volatile("trap;"); }

// All 32 lanes take part.
template <class T>
FUSEDLOSS_INLINE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kWarp, value, lane_mask);
}

FUSEDLOSS_INLINE bool all(bool value) { return __all_sync(kWarp, value); }

// Dynamic shared memory, aligned to 1024 bytes, and the address that ldmatrix, cp.async and mbarriers take.
FUSEDLOSS_INLINE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fusedloss_shared[];
  return fusedloss_shared;
}
FUSEDLOSS_INLINE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Numbers -------------------------------------------------------------------------------------------------------------

// ex2.approx.ftz: 2 ulp, denormal results are 0.
FUSEDLOSS_INLINE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// rcp.approx.ftz: 1 ulp.
FUSEDLOSS_INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded to nearest in one register, `low` in the lower half.
FUSEDLOSS_INLINE uint32_t pack(bf16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FUSEDLOSS_INLINE uint32_t pack(fp16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FUSEDLOSS_INLINE float to_float(float x) { return x; }
FUSEDLOSS_INLINE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FUSEDLOSS_INLINE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
FUSEDLOSS_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{uint16_t(pack(T{}, x, 0.0f))};
  }
}
// To tf32's 10 bits of mantissa, half away from zero; the product ignores the rest.
FUSEDLOSS_INLINE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
FUSEDLOSS_INLINE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
FUSEDLOSS_INLINE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// Global memory -------------------------------------------------------------------------------------------------------

// Through the read-only cache.
template <class T>
FUSEDLOSS_INLINE T load(const T* pointer) {
  return __ldg(pointer);
}
FUSEDLOSS_INLINE bf16 load(const bf16* pointer) {
  return bf16{__ldg(reinterpret_cast<const unsigned short*>(pointer))};
}
FUSEDLOSS_INLINE fp16 load(const fp16* pointer) {
  return fp16{__ldg(reinterpret_cast<const unsigned short*>(pointer))};
}
// 16 bytes at a multiple of 16.
FUSEDLOSS_INLINE Vector16 load16(const void* pointer) {
  const uint4 v = __ldg(static_cast<const uint4*>(pointer));
  return {{v.x, v.y, v.z, v.w}};
}
// The same of what this kernel writes, too: not through the read-only cache.
FUSEDLOSS_INLINE Vector16 read16(const void* pointer) {
  const uint4 v = *static_cast<const uint4*>(pointer);
  return {{v.x, v.y, v.z, v.w}};
}
FUSEDLOSS_INLINE void store16(void* pointer, Vector16 v) {
  __stwb(static_cast<uint4*>(pointer), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}
FUSEDLOSS_INLINE void store8(void* pointer, float x, float y) {
  __stwb(static_cast<float2*>(pointer), make_float2(x, y));
}

// sm_80: asynchronous copies and products of a warp -------------------------------------------------------------------

// 16 bytes into shared memory, of which the first `bytes` (0 to 16) are read and the rest are 0.
FUSEDLOSS_INLINE void cp_async16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
FUSEDLOSS_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are under way.
template <int N>
FUSEDLOSS_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane 8 i + j brings the address of row j of matrix i.
FUSEDLOSS_INLINE void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FUSEDLOSS_INLINE void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// From sm_90 on: the way back, with the registers and addresses of ldmatrix. Other lanes read it behind sync_warp.
FUSEDLOSS_INLINE void stmatrix(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// c += a b. m16n8k16 of 16-bit numbers, m16n8k8 of tf32.
#define FUSEDLOSS_MMA(TYPE, INSTRUCTION)                                                                       \
  FUSEDLOSS_INLINE void mma(TYPE, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {             \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
  }
FUSEDLOSS_MMA(bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
FUSEDLOSS_MMA(fp16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
FUSEDLOSS_MMA(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSEDLOSS_MMA

// sm_90: the tensor memory accelerator and products of a warpgroup ----------------------------------------------------
//
// Only sm_90a has them: kernels that call them keep their bodies under the same condition.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// One value for the whole warp, which lets the compiler keep what follows from it in uniform registers.
FUSEDLOSS_INLINE int uniform(int value) { return __shfl_sync(kWarp, value, 0); }
// True in one lane of a whole warp.
FUSEDLOSS_INLINE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}
// Registers of every thread of a warpgroup, which must execute this as one: a warp that took another branch would leave
// the others waiting. `inc` waits until as many registers were given back.
template <int N>
FUSEDLOSS_INLINE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FUSEDLOSS_INLINE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

FUSEDLOSS_INLINE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Of all threads of all blocks of a cluster; whole warps.
FUSEDLOSS_INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mbarriers are 8 bytes of shared memory, by their address.
FUSEDLOSS_INLINE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After a thread's mbarrier_init: the first fence lets the cluster's other blocks arrive there, the second the
// accelerator, which sees shared memory through another proxy. A barrier of the threads has to follow.
FUSEDLOSS_INLINE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// One arrival, and `bytes` more that have to land before the phase is over.
FUSEDLOSS_INLINE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
FUSEDLOSS_INLINE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the same barrier of the cluster's block `rank`, which may be the own one.
FUSEDLOSS_INLINE void mbarrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity is over. Each try sleeps for a time that the hardware chooses. Waits and arrivals have
// the scope of a block, also between the blocks of a cluster: the accelerator loads all that passes between these, and
// `.cluster` would flush and invalidate L1 at every step (MEMBAR.ALL.GPU and CCTL.IVALL in the SASS).
FUSEDLOSS_INLINE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// `map` points to a kernel's __grid_constant__ parameter.
FUSEDLOSS_INLINE void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The map's box with its first element at (column, row), into shared memory; its bytes count at the barrier when they
// have landed. What is outside of the matrix is 0, and counts, too.
FUSEDLOSS_INLINE void tma_load(uint32_t shared, const void* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same into every block of the cluster whose bit is set, at the same offset, and counted at each one's barrier.
FUSEDLOSS_INLINE void tma_load_multicast(uint32_t shared, const void* map, int column, int row, uint32_t barrier,
                                         uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Before a warpgroup's first product, and before products whose accumulators other instructions have touched.
FUSEDLOSS_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FUSEDLOSS_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the committed groups are under way.
template <int N>
FUSEDLOSS_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler takes an accumulator for written where the product was issued. This keeps its reads behind the wait.
template <int NT>
FUSEDLOSS_INLINE void wgmma_done(float (&c)[NT][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    asm volatile("" : "+f"(c[nt][0]), "+f"(c[nt][1]), "+f"(c[nt][2]), "+f"(c[nt][3])::"memory");
  }
}

// c += a b: 64 rows of x times 128 or 256 of y, 32 bytes of each row, both by descriptor. Warp w has rows 16 w to
// 16 w + 15, and of these and of columns 8 nt to 8 nt + 7 each lane what it has of an m16n8 product in c[nt].
// wgmma_first: c = a b, without reading c.
#define FUSEDLOSS_TEN(T) "%" #T "0,%" #T "1,%" #T "2,%" #T "3,%" #T "4,%" #T "5,%" #T "6,%" #T "7,%" #T "8,%" #T "9,"
#define FUSEDLOSS_THIRTY(T, U, V) FUSEDLOSS_TEN(T) FUSEDLOSS_TEN(U) FUSEDLOSS_TEN(V)
#define FUSEDLOSS_REGISTERS_128 FUSEDLOSS_THIRTY(, 1, 2) FUSEDLOSS_THIRTY(3, 4, 5) "%60,%61,%62,%63"
#define FUSEDLOSS_REGISTERS_256                                       \
  FUSEDLOSS_THIRTY(, 1, 2)                                            \
  FUSEDLOSS_THIRTY(3, 4, 5)                                           \
  FUSEDLOSS_THIRTY(6, 7, 8)                                           \
  FUSEDLOSS_THIRTY(9, 10, 11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define FUSEDLOSS_4(F, NT) F(c[NT][0]), F(c[NT][1]), F(c[NT][2]), F(c[NT][3])
#define FUSEDLOSS_16(F, NT) FUSEDLOSS_4(F, NT), FUSEDLOSS_4(F, NT + 1), FUSEDLOSS_4(F, NT + 2), FUSEDLOSS_4(F, NT + 3)
#define FUSEDLOSS_OPERANDS_128(F) FUSEDLOSS_16(F, 0), FUSEDLOSS_16(F, 4), FUSEDLOSS_16(F, 8), FUSEDLOSS_16(F, 12)
#define FUSEDLOSS_OPERANDS_256(F)                                                                               \
  FUSEDLOSS_OPERANDS_128(F), FUSEDLOSS_16(F, 16), FUSEDLOSS_16(F, 20), FUSEDLOSS_16(F, 24), FUSEDLOSS_16(F, 28)

// A, B: the numbers of the operands after the registers. The last immediates: no negation, K-major.
#define FUSEDLOSS_WGMMA(NAME, F, ACCUMULATE, TYPE, N, SHAPE, MAJOR, A, B)                                \
  FUSEDLOSS_INLINE void NAME(TYPE, float (&c)[N / 8][4], uint64_t a, uint64_t b) {                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" FUSEDLOSS_REGISTERS_##N "}, " A ", " B \
                 ", p, 1, 1" MAJOR ";\n}"                                                                \
                 : FUSEDLOSS_OPERANDS_##N(F)                                                             \
                 : "l"(a), "l"(b));                                                                      \
  }
#define FUSEDLOSS_WGMMA_TYPE(TYPE, SHAPE, MAJOR)                                            \
  FUSEDLOSS_WGMMA(wgmma, "+f", "1", TYPE, 128, SHAPE, MAJOR, "%64", "%65")                  \
  FUSEDLOSS_WGMMA(wgmma, "+f", "1", TYPE, 256, SHAPE, MAJOR, "%128", "%129")                \
  FUSEDLOSS_WGMMA(wgmma_first, "=f", "0", TYPE, 128, SHAPE, MAJOR, "%64", "%65")            \
  FUSEDLOSS_WGMMA(wgmma_first, "=f", "0", TYPE, 256, SHAPE, MAJOR, "%128", "%129")
FUSEDLOSS_WGMMA_TYPE(bf16, "k16.f32.bf16.bf16", ", 0, 0")
FUSEDLOSS_WGMMA_TYPE(fp16, "k16.f32.f16.f16", ", 0, 0")
FUSEDLOSS_WGMMA_TYPE(float, "k8.f32.tf32.tf32", "")
#undef FUSEDLOSS_WGMMA_TYPE
#undef FUSEDLOSS_WGMMA
#undef FUSEDLOSS_OPERANDS_256
#undef FUSEDLOSS_OPERANDS_128
#undef FUSEDLOSS_16
#undef FUSEDLOSS_4
#undef FUSEDLOSS_REGISTERS_256
#undef FUSEDLOSS_REGISTERS_128
#undef FUSEDLOSS_THIRTY
#undef FUSEDLOSS_TEN

#endif  // sm_90a

}  // namespace fusedloss::ptx

#endif  // FUSEDLOSS_HOST
