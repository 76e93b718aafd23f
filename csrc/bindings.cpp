// fusedloss._C: the only file that knows Python. Tensors come in as integers (pointers, sizes, strides, a stream), so
// nothing here depends on torch or its ABI; the callers in fusedloss/backends check shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "row_ops.h"

namespace py = pybind11;
using namespace fusedloss;

namespace {

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

py::dict build_info() {
  py::dict info;
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = py::str(STRING(FUSEDLOSS_ARCHS)).attr("split")(":");
  return info;
}

void scale_rows_(uintptr_t in, uintptr_t out, DType out_dtype, uintptr_t row_factor, uintptr_t scalar, int64_t M,
                 int64_t D, int64_t in_stride, int64_t out_stride, uintptr_t stream) {
  if (M < 0 || D < 0) throw std::invalid_argument("scale_rows: M and D must not be negative");
  ScaleRowsParams params;
  params.in = reinterpret_cast<const float*>(in);
  params.out = reinterpret_cast<void*>(out);
  params.row_factor = reinterpret_cast<const float*>(row_factor);
  params.scalar = reinterpret_cast<const float*>(scalar);
  params.M = M;
  params.D = D;
  params.in_stride = in_stride;
  params.out_stride = out_stride;
  params.out_dtype = out_dtype;
  check(scale_rows(params, reinterpret_cast<cudaStream_t>(stream)), "scale_rows");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "cuda_version, and archs: what the kernels were compiled for");

  py::enum_<DType>(m, "DType")
      .value("float32", DType::float32)
      .value("float16", DType::float16)
      .value("bfloat16", DType::bfloat16);

  // The lock is released: a launch waits when the stream's queue is full.
  m.def("scale_rows", &scale_rows_, py::call_guard<py::gil_scoped_release>(), py::arg("input"), py::arg("out"),
        py::arg("out_dtype"), py::kw_only(), py::arg("row_factor") = 0, py::arg("scalar") = 0, py::arg("M"),
        py::arg("D"), py::arg("in_stride"), py::arg("out_stride"), py::arg("stream"),
        "out[m, d] = cast(input[m, d] * row_factor[m] * scalar[0]); pointers to device memory, 0 for a factor of 1");
}
