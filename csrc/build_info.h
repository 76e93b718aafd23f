// What the extension is made of, and what CUDA says of an error: apart from bindings.cpp, which takes half a minute to
// compile and hangs on neither.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace fusedloss {

struct BuildInfo {
  std::string cuda_version;    // of the runtime, which is linked statically
  std::string driver_version;  // the newest CUDA that the driver here runs; empty without one
  std::string archs;           // what the kernels were compiled for, between colons
};

// Asks the driver for its version alone: no context is made, on no device.
BuildInfo build_info();

// "cudaErrorName: what CUDA says of it"
std::string error_text(cudaError_t error);

}  // namespace fusedloss
