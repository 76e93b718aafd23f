// What happens once per row, beside the similarity GEMM: fusedloss/core/rows.py is the definition, kernels/rows.py the
// same in Triton; rows_fields.h has each launch's formula and parameters. Free of torch: plain data, pointers to device
// memory and a stream. A null pointer is what Python calls None. Vectors are contiguous; strides are in elements.
//
// All sizes may be 0, all alignments are served. Asynchronous on `stream`, which must belong to the current device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace fusedloss {

#define STRUCT(name) struct name {
#define FIELD(type, name, ...) type name{__VA_ARGS__};
#define END };
#define LAUNCH(name, Params) cudaError_t name(const Params& params, cudaStream_t stream);
#include "rows_fields.h"
#include "fields_end.h"

}  // namespace fusedloss
