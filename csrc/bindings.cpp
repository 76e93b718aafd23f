// fusedloss._C: the only file that knows Python. A launch takes its parameters as an object with the fields of the
// struct in csrc/ and a stream. Tensors come in as integers (pointers, sizes, strides), so nothing here depends on
// torch or its ABI; the callers in fusedloss/backends check shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#include <functional>
#include <initializer_list>
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

// A class of plain data, whose objects are made by keywords and have no attributes; what is not given is as in S{}:
//   using S = MergeParams;
//   Fields<S>(m, "MergeParams") FIELD(max) FIELD(sum) FIELD(R);
// Structs may be members of others. Classes are the module's own: in the tests a CPU's build of it is loaded, too.
#define FIELD(name) (#name, &S::name)
#define SIZE(name) {#name, &S::name}

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
  Fields& operator()(const char* name, T S::*member) {
    setters_->emplace(name, [member](S& made, py::handle value) { set(made.*member, value); });
    return *this;
  }

 private:
  using Setters = std::unordered_map<std::string, std::function<void(S&, py::handle)>>;
  std::shared_ptr<Setters> setters_;
};

// m.name(params, stream): ValueError where one of `sizes` is negative, RuntimeError where CUDA says no.
template <class S>
void def_launch(py::module_& m, const char* name, cudaError_t (*function)(const S&, cudaStream_t),
                std::initializer_list<std::pair<const char*, int64_t S::*>> sizes) {
  const auto run = [=, sizes = std::vector(sizes)](const S& params, uintptr_t stream) {
    for (const auto& [size, member] : sizes) {
      if (params.*member < 0) throw std::invalid_argument(std::string(name) + ": negative " + size);
    }
    check(function(params, reinterpret_cast<cudaStream_t>(stream)), name);
  };
  // The lock is released: a launch waits when the stream's queue is full.
  m.def(name, run, py::arg("params"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void def_rows(py::module_& m) {
  {
    using S = PrepareParams;
    Fields<S>(m, "PrepareParams") FIELD(x) FIELD(y) FIELD(dtype) FIELD(target) FIELD(scale) FIELD(bias)
        FIELD(row_factor) FIELD(col_factor) FIELD(score) FIELD(target_sim) FIELD(slope) FIELD(M) FIELD(N) FIELD(D)
        FIELD(stride_xm) FIELD(stride_xd) FIELD(stride_yn) FIELD(stride_yd) FIELD(softcap) FIELD(margin_angle)
        FIELD(margin_cosine);
    def_launch(m, "prepare", &prepare, {SIZE(M), SIZE(N), SIZE(D)});
  }
  {
    using S = MergeParams;
    Fields<S>(m, "MergeParams") FIELD(max) FIELD(sum) FIELD(running_max) FIELD(running_sum) FIELD(n_tiles) FIELD(R);
    def_launch(m, "merge", &merge, {SIZE(n_tiles), SIZE(R)});
  }
  {
    using S = SettleParams;
    Fields<S>(m, "SettleParams") FIELD(max) FIELD(sum) FIELD(shift) FIELD(score) FIELD(weight) FIELD(label_smoothing)
        FIELD(copies) FIELD(z_loss) FIELD(decoupled) FIELD(smooth) FIELD(slope) FIELD(row_shift) FIELD(over_l)
        FIELD(entry) FIELD(loss) FIELD(out) FIELD(out_dtype) FIELD(target) FIELD(row_factor) FIELD(col_factor)
        FIELD(stride_om) FIELD(n_tiles) FIELD(R);
    def_launch(m, "settle", &settle, {SIZE(n_tiles), SIZE(R)});
  }
  {
    using S = ScaleRowsParams;
    Fields<S>(m, "ScaleRowsParams") FIELD(input) FIELD(out) FIELD(in_dtype) FIELD(out_dtype) FIELD(row_factor)
        FIELD(scalar) FIELD(M) FIELD(D) FIELD(in_stride) FIELD(in_stride_d) FIELD(out_stride);
    def_launch(m, "scale_rows", &scale_rows, {SIZE(M), SIZE(D)});
  }
  {
    using S = WeighParams;
    Fields<S>(m, "WeighParams") FIELD(out) FIELD(dtype) FIELD(row_weight) FIELD(col_weight) FIELD(entry) FIELD(target)
        FIELD(row_factor) FIELD(col_factor) FIELD(R) FIELD(N) FIELD(stride_om);
    def_launch(m, "weigh", &weigh, {SIZE(R), SIZE(N)});
  }
  {
    using S = FinishParams;
    Fields<S>(m, "FinishParams") FIELD(total) FIELD(over_l) FIELD(scale) FIELD(gain) FIELD(x) FIELD(factor) FIELD(out)
        FIELD(x_dtype) FIELD(out_dtype) FIELD(R) FIELD(D) FIELD(stride_tm) FIELD(stride_xm) FIELD(stride_xd)
        FIELD(stride_om);
    def_launch(m, "finish", &finish, {SIZE(R), SIZE(D)});
  }
}

template <class T, class Args>
using Launch = cudaError_t (*)(const Strip&, const Args&, const Plan&, cudaStream_t);

// m.name(strip, dtype of the operands, args, plan, stream)
template <class Args>
void def_similarity(py::module_& m, const char* name, Launch<float, Args> fp32, Launch<fp16, Args> half,
                    Launch<bf16, Args> bfloat) {
  const auto run = [=](const Strip& strip, DType dtype, const Args& args, const Plan& plan, uintptr_t stream) {
    if (strip.M < 0 || strip.N < 0 || strip.D < 0) throw std::invalid_argument(std::string(name) + ": negative size");
    const auto function = dtype == DType::float32 ? fp32 : dtype == DType::float16 ? half : bfloat;
    check(function(strip, args, plan, reinterpret_cast<cudaStream_t>(stream)), name);
  };
  m.def(name, run, py::arg("strip"), py::arg("dtype"), py::arg("args"), py::arg("plan"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}
#define SIMILARITY(name) \
  def_similarity(m, #name, &Similarities<float>::name, &Similarities<fp16>::name, &Similarities<bf16>::name)

void def_similarities(py::module_& m) {
  {
    using S = Masks;
    Fields<S>(m, "Masks") FIELD(drop_rows) FIELD(drop_keys) FIELD(keep_rows) FIELD(keep_keys) FIELD(dense) FIELD(bits)
        FIELD(threshold) FIELD(exempt) FIELD(skip) FIELD(own) FIELD(own_scale) FIELD(stride_dm) FIELD(stride_dn)
        FIELD(stride_bm);
  }
  {
    using S = Strip;
    Fields<S>(m, "Strip") FIELD(x) FIELD(y) FIELD(out) FIELD(M) FIELD(N) FIELD(D) FIELD(stride_xm) FIELD(stride_xd)
        FIELD(stride_yn) FIELD(stride_yd) FIELD(stride_om) FIELD(scale) FIELD(row_factor) FIELD(col_factor) FIELD(bias)
        FIELD(softcap) FIELD(target) FIELD(tensor_cores) FIELD(masks);
  }
  {
    using S = TallyArgs;
    Fields<S>(m, "TallyArgs") FIELD(score) FIELD(count) FIELD(above) FIELD(max) FIELD(z) FIELD(sim);
  }
  {
    using S = StatsArgs;
    Fields<S>(m, "StatsArgs") FIELD(row_max) FIELD(row_sum) FIELD(col_max) FIELD(col_sum) FIELD(tally);
    SIMILARITY(stats);
  }
  {
    using S = ExpArgs;
    Fields<S>(m, "ExpArgs") FIELD(shift) FIELD(row_sum) FIELD(col_sum) FIELD(tally);
    SIMILARITY(exp);
  }
  {
    using S = GradArgs;
    Fields<S>(m, "GradArgs") FIELD(gain) FIELD(row_shift) FIELD(row_weight) FIELD(entry) FIELD(row_target_sim)
        FIELD(col_shift) FIELD(col_weight) FIELD(col_target_sim) FIELD(q) FIELD(smooth);
    SIMILARITY(grad);
  }
  {
    using S = TopArgs;
    Fields<S>(m, "TopArgs") FIELD(top) FIELD(column);
    SIMILARITY(top);
  }
  {
    using S = PickArgs;
    Fields<S>(m, "PickArgs") FIELD(picked);
    SIMILARITY(pick);
  }
  {
    using S = BitsArgs;
    Fields<S>(m, "BitsArgs") FIELD(threshold) FIELD(bits) FIELD(words);
    SIMILARITY(guide);
  }
  {
    Fields<StoreArgs>(m, "StoreArgs");
    SIMILARITY(store);
  }
  {
    using S = FoldArgs;
    Fields<S>(m, "FoldArgs") FIELD(weight) FIELD(row_labels) FIELD(key_labels) FIELD(own) FIELD(target_value)
        FIELD(sigmoid_bias) FIELD(margin) FIELD(sign) FIELD(pulls) FIELD(loss) FIELD(count) FIELD(scale_grad)
        FIELD(bias_grad);
    SIMILARITY(sigmoid);
    SIMILARITY(margin_ranking);
    SIMILARITY(pair_hinge);
  }
  {
    using S = SidesArgs;
    Fields<S>(m, "SidesArgs") FIELD(row_labels) FIELD(key_labels) FIELD(own) FIELD(pull) FIELD(push) FIELD(pull_base)
        FIELD(push_base) FIELD(margin) FIELD(gamma) FIELD(pull_max) FIELD(pull_sum) FIELD(push_max) FIELD(push_sum)
        FIELD(count) FIELD(pull_shift) FIELD(pull_weight) FIELD(push_shift) FIELD(push_weight) FIELD(q);
    SIMILARITY(sides_stats);
    SIMILARITY(sides_grad);
    SIMILARITY(circle_stats);
    SIMILARITY(circle_grad);
  }
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
