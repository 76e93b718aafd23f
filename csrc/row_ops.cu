#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "row_ops.h"

namespace fusedloss {
namespace {

constexpr int kLanes = 32;          // threads along a row
constexpr int kRows = 8;            // rows per block: 256 threads keep their place also when a row has few elements
constexpr int kVectorsPerLane = 4;  // before a second block helps with the same row
constexpr int64_t kMaxRowBlocks = 1 << 16;  // from here on blocks walk on through the rows
constexpr int64_t kMaxColumnBlocks = 65535;  // the limit of gridDim.y

__device__ void store(float* out, float x) { *out = x; }
__device__ void store(__half* out, float x) { *out = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

__device__ float4 times(float4 x, float a, float b) {
  return make_float4(x.x * a * b, x.y * a * b, x.z * a * b, x.w * a * b);
}

template <class Pair>
__device__ unsigned bits(Pair pair) {
  static_assert(sizeof(Pair) == sizeof(unsigned), "two 16-bit numbers");
  return *reinterpret_cast<const unsigned*>(&pair);
}

// 16 bytes of out. __stwb is an ordinary store, but stays one: of an assignment the compiler makes four (see the PTX).
__device__ void store16(float* out, const float4* in, float a, float b) {
  __stwb(reinterpret_cast<float4*>(out), times(in[0], a, b));
}
__device__ void store16(__half* out, const float4* in, float a, float b) {
  const float4 x = times(in[0], a, b), y = times(in[1], a, b);
  __stwb(reinterpret_cast<uint4*>(out),
         make_uint4(bits(__floats2half2_rn(x.x, x.y)), bits(__floats2half2_rn(x.z, x.w)),
                    bits(__floats2half2_rn(y.x, y.y)), bits(__floats2half2_rn(y.z, y.w))));
}
__device__ void store16(__nv_bfloat16* out, const float4* in, float a, float b) {
  const float4 x = times(in[0], a, b), y = times(in[1], a, b);
  __stwb(reinterpret_cast<uint4*>(out),
         make_uint4(bits(__floats2bfloat162_rn(x.x, x.y)), bits(__floats2bfloat162_rn(x.z, x.w)),
                    bits(__floats2bfloat162_rn(y.x, y.y)), bits(__floats2bfloat162_rn(y.z, y.w))));
}

// A thread writes VEC neighbours at once. VEC = 16 / sizeof(T) needs every row aligned; the D % VEC elements at a row's
// end, and with VEC = 1 all of them, go one by one.
template <class T, int VEC>
__global__ void __launch_bounds__(kLanes* kRows) scale_rows_kernel(ScaleRowsParams p) {
  const float scalar = p.scalar ? *p.scalar : 1.0f;
  const int64_t vectors = VEC == 1 ? 0 : p.D / VEC;
  const int64_t first = int64_t(blockIdx.y) * kLanes + threadIdx.x;
  const int64_t step = int64_t(gridDim.y) * kLanes;

  for (int64_t m = int64_t(blockIdx.x) * kRows + threadIdx.y; m < p.M; m += int64_t(gridDim.x) * kRows) {
    const float* in = p.in + m * p.in_stride;
    T* out = static_cast<T*>(p.out) + m * p.out_stride;
    const float row_factor = p.row_factor ? p.row_factor[m] : 1.0f;

    if constexpr (VEC > 1) {
#pragma unroll 1
      for (int64_t v = first; v < vectors; v += step) {
        store16(out + v * VEC, reinterpret_cast<const float4*>(in + v * VEC), row_factor, scalar);
      }
    }
#pragma unroll 1
    for (int64_t d = vectors * VEC + first; d < p.D; d += step) store(out + d, in[d] * row_factor * scalar);
  }
}

bool rows_aligned(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

template <class T>
cudaError_t launch(const ScaleRowsParams& p, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  const bool vectorised =
      rows_aligned(p.in, p.in_stride * int64_t(sizeof(float))) && rows_aligned(p.out, p.out_stride * int64_t(sizeof(T)));
  const auto blocks = [](int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; };
  const int64_t per_row = vectorised ? std::max<int64_t>(p.D / VEC, 1) : p.D;
  const dim3 grid(unsigned(std::min(blocks(p.M, kRows), kMaxRowBlocks)),
                  unsigned(std::min(blocks(per_row, kLanes * kVectorsPerLane), kMaxColumnBlocks)));
  const dim3 block(kLanes, kRows);
  if (vectorised) {
    scale_rows_kernel<T, VEC><<<grid, block, 0, stream>>>(p);
  } else {
    scale_rows_kernel<T, 1><<<grid, block, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale_rows(const ScaleRowsParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.D == 0) return cudaSuccess;  // a grid of 0 blocks is an error
  switch (p.out_dtype) {
    case DType::float32:
      return launch<float>(p, stream);
    case DType::float16:
      return launch<__half>(p, stream);
    case DType::bfloat16:
      return launch<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusedloss
