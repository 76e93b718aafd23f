// fusedloss._C: the only file that knows Python. A launch takes its parameters as an object with the fields of the
// struct in csrc/ and a stream. Tensors come in as integers (pointers, sizes, strides), so nothing here depends on
// torch or its ABI; the callers in fusedloss/backends check shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "build_info.h"
#include "rows.h"
#include "similarity.h"

namespace py = pybind11;
using namespace fusedloss;

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + error_text(error));
}

py::dict info() {
  const BuildInfo built = build_info();
  py::dict info;
  info["cuda_version"] = built.cuda_version;
  info["driver_version"] = built.driver_version;
  info["archs"] = py::str(built.archs).attr("split")(":");
  return info;
}

// One member from Python: a pointer is an int or None, an array of pointers a list of them, the rest what it is.
template <class T>
void set(T& member, py::handle value) {
  member = value.cast<T>();
}
template <class T>
void set(T*& member, py::handle value) {
  member = value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}
template <class T, size_t N>
void set(T* (&member)[N], py::handle value) {
  if (!py::isinstance<py::sequence>(value)) throw py::cast_error("a list of pointers");
  const auto given = value.cast<py::sequence>();
  if (given.size() > N) throw py::value_error("at most " + std::to_string(N) + " pointers");
  for (size_t k = 0; k < given.size(); ++k) set(member[k], given[k]);
}

// Of a struct's fields those that are sizes.
template <class S>
std::vector<std::pair<const char*, std::function<int64_t(const S&)>>> sizes;

// ValueError where one is negative.
template <class S>
void check_sizes(const char* launch, const S& given) {
  for (const auto& [name, size] : sizes<S>) {
    if (size(given) < 0) throw std::invalid_argument(launch + (std::string(": negative ") + name));
  }
}

// A class of plain data, whose objects are made by keywords and have no attributes; what is not given is as in S{}.
// Structs may be members of others. Classes are the module's own: in the tests a CPU's build of it is loaded, too.
template <class S>
class Fields {
 public:
  Fields(py::module_& m, const char* type) : setters_(std::make_shared<Setters>()) {
    py::class_<S>(m, type, py::module_local()).def(py::init([type, setters = setters_](const py::kwargs& given) {
      S made{};
      for (const auto& [key, value] : given) {
        const auto name = key.template cast<std::string>();
        const auto setter = setters->find(name);
        if (setter == setters->end()) throw py::type_error(type + ("." + name) + ": no such field");
        try {
          setter->second(made, value);
        } catch (const py::cast_error&) {
          throw py::type_error(type + ("." + name) + " cannot be " + py::repr(value).template cast<std::string>());
        }
      }
      return made;
    }));
  }
  template <class T>
  Fields& field(const char* name, T S::*member) {
    setters_->emplace(name, [member](S& made, py::handle value) { set(made.*member, value); });
    return *this;
  }
  template <class T>
  Fields& size(const char* name, T S::*member) {
    sizes<S>.emplace_back(name, [member](const S& given) { return given.*member; });
    return field(name, member);
  }

 private:
  using Setters = std::unordered_map<std::string, std::function<void(S&, py::handle)>>;
  std::shared_ptr<Setters> setters_;
};

// m.name(params, stream): RuntimeError where CUDA says no.
template <class S>
void def_launch(py::module_& m, const char* name, cudaError_t (*function)(const S&, cudaStream_t)) {
  const auto run = [=](const S& params, uintptr_t stream) {
    check_sizes(name, params);
    check(function(params, reinterpret_cast<cudaStream_t>(stream)), name);
  };
  // The lock is released: a launch waits when the stream's queue is full.
  m.def(name, run, py::arg("params"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

template <class T, class Args>
using Launch = cudaError_t (*)(const Strip&, const Args&, const Plan&, cudaStream_t);

// m.name(strip, dtype of the operands, args, plan, stream)
template <class Args>
void def_similarity(py::module_& m, const char* name, Launch<float, Args> fp32, Launch<fp16, Args> half,
                    Launch<bf16, Args> bfloat) {
  const auto run = [=](const Strip& strip, DType dtype, const Args& args, const Plan& plan, uintptr_t stream) {
    check_sizes(name, strip);
    const auto function = dtype == DType::float32 ? fp32 : dtype == DType::float16 ? half : bfloat;
    check(function(strip, args, plan, reinterpret_cast<cudaStream_t>(stream)), name);
  };
  m.def(name, run, py::arg("strip"), py::arg("dtype"), py::arg("args"), py::arg("plan"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}

#define STRUCT(name)  \
  {                   \
    using S = name;   \
    Fields<S>(m, #name)
#define FIELD(type, name, ...) .field(#name, &S::name)
#define SIZE(type, name) .size(#name, &S::name)
#define END \
  ;         \
  }

void def_rows(py::module_& m) {
#define LAUNCH(name, Params) def_launch(m, #name, &name);
#include "rows_fields.h"
#undef LAUNCH
}

void def_similarities(py::module_& m) {
#define LAUNCH(name, Args) \
  def_similarity(m, #name, &Similarities<float>::name, &Similarities<fp16>::name, &Similarities<bf16>::name);
#include "similarity_fields.h"
#include "fields_end.h"
  py::class_<Plan>(m, "Plan", py::module_local())
      .def_readonly("capability", &Plan::capability)
      .def_readonly("BLOCK_M", &Plan::BLOCK_M)
      .def_readonly("BLOCK_N", &Plan::BLOCK_N)
      .def_readwrite("cluster", &Plan::cluster)  // for benchmarks
      .def_readwrite("blocks", &Plan::blocks);   // and tests
  m.def("plan", &plan, py::arg("capability"), py::arg("tensor_cores"), py::arg("aligned"), py::arg("narrow"),
        "which kernel, and the tiles that its tables are of");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &info,
        "cuda_version, of the runtime inside; driver_version: the newest that the driver here runs, or ''; archs: what "
        "the kernels were compiled for");

  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("float16", DType::float16)
      .value("bfloat16", DType::bfloat16);

  def_rows(m);
  def_similarities(m);
}
