// Launches of the similarity GEMM. similarity_fields.h has their parameters, a strip and an epilogue's arguments. Plain
// data; a null pointer is what Python calls None. Every pointer is to device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace fusedloss {

constexpr int kMaxCompares = 4;  // of each kind in one mask
constexpr int kMaxExempt = 8;

template <int N>
using Pointers = const int64_t* [N];

#define STRUCT(name) struct name {
#define FIELD(type, name, ...) type name{__VA_ARGS__};
#define END };
#define LAUNCH(name, Args)
#include "similarity_fields.h"
#include "fields_end.h"

// Which kernel runs a launch. BLOCK_M and BLOCK_N are the tables'.
struct Plan {
  int capability;  // 80 or 90: the kernel's, at most the device's
  int BLOCK_M, BLOCK_N;
  int cluster;  // 90: blocks along M that share what they load of y, 1 or 2 (not of narrow epilogues); 0: by M
  int blocks;   // 90: at most so many, which leaves multiprocessors to others; 0: one on each
};

// A pure function of what is asked: the device's capability (86, 90, ...; 0 on the host); whether products are the
// tensor cores'; whether both operands are row-major with rows that start at multiples of 16 bytes; and whether the
// epilogue is a narrow one: of fp32, general (masks, a softcap, a tally, smoothing), top or a fold.
Plan plan(int capability, bool tensor_cores, bool aligned, bool narrow);

// Launches, asynchronous on `stream`, which must belong to the current device. Whatever they return but cudaSuccess,
// nothing was launched. T: float, fp16 or bf16.
template <class T>
struct Similarities {
#define STRUCT(name)
#define FIELD(type, name, ...)
#define END
#define LAUNCH(name, Args) static cudaError_t name(const Strip&, const Args&, const Plan&, cudaStream_t);
#include "similarity_fields.h"
#include "fields_end.h"
};

}  // namespace fusedloss
