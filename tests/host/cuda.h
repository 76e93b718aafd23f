// The driver's part of tensor maps, in the toolkit's place: what is encoded keeps to the driver's rules and to what
// ptx_host90.h can load, rows of two dimensions in boxes of 64 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 = 11 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 2 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

namespace fusedloss::host {

struct TensorMap {
  static constexpr uint64_t kEncoded = 0x70616d20726f736e;

  uint64_t encoded;
  const unsigned char* base;
  int64_t sizes[2], stride;  // of the columns first, in bytes
  int box[2], element;
  bool tf32;
};

}  // namespace fusedloss::host

struct alignas(64) CUtensorMap {
  union {
    cuuint64_t opaque[16];
    fusedloss::host::TensorMap host;
  };
};

inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                  const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                  const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool tf32 = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const cuuint64_t element = tf32 ? 4 : 2;
  bool valid = uintptr_t(map) % 64 == 0 && rank == 2 && base && uintptr_t(base) % 16 == 0;
  for (int d = 0; valid && d < 2; d++) {
    valid = sizes[d] >= 1 && sizes[d] <= cuuint64_t(1) << 32 && box[d] >= 1 && box[d] <= 256 && every[d] == 1;
  }
  valid = valid && strides[0] % 16 == 0 && strides[0] < cuuint64_t(1) << 40 && strides[0] >= sizes[0] * element;
  if (!valid || box[0] * element != 64) return CUDA_ERROR_INVALID_VALUE;
  map->host = {fusedloss::host::TensorMap::kEncoded,
               static_cast<const unsigned char*>(base),
               {int64_t(sizes[0]), int64_t(sizes[1])},
               int64_t(strides[0]),
               {int(box[0]), int(box[1])},
               int(element),
               tf32};
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, int, cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSymbolNotFound;
  if (std::strcmp(name, "cuTensorMapEncodeTiled")) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
