// Every instruction that C++ has no word for, a function each, named after the PTX ISA. Nothing else in csrc/ holds
// assembly or an intrinsic, so that a second implementation of this one header, tests/host/ptx_host.h, lets the sm_80
// kernels run on a CPU.
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

// Threads --------------------------------------------------------------------------------------------------------------

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

// All 32 lanes take part.
template <class T>
FUSEDLOSS_INLINE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kWarp, value, lane_mask);
}

// Dynamic shared memory, aligned to 1024 bytes, and the address that ldmatrix, cp.async and mbarriers take.
FUSEDLOSS_INLINE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fusedloss_shared[];
  return fusedloss_shared;
}
FUSEDLOSS_INLINE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Numbers --------------------------------------------------------------------------------------------------------------

// ex2.approx.ftz: 2 ulp, denormal results are 0.
FUSEDLOSS_INLINE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// Global memory --------------------------------------------------------------------------------------------------------

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

// sm_80: asynchronous copies and products of a warp ----------------------------------------------------------------------

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

}  // namespace fusedloss::ptx

#endif  // FUSEDLOSS_HOST
