// A CUDA runtime of two devices that runs nothing: it checks what it is asked by CUDA's rules, answers with CUDA's
// errors, and writes every launch down. What CUDA would not notice (an operand on another device, a misplaced box) is a
// fault, which a test finds beside the launches.
#include "cuda_runtime.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cuda.h"

namespace {

constexpr int kDevices = 2;
struct Device {
  int capability = 90, multiprocessors = 132;
  int shared() const {  // the most that a block may ask for, 1 KiB less than a multiprocessor has for one
    switch (capability) {
      case 80:
      case 87:
        return 163 << 10;
      case 90:
      case 100:
      case 103:
        return 227 << 10;
      default:
        return 99 << 10;
    }
  }
};
Device devices[kDevices];
int driver = 13000;
bool deaf = false;  // attributes have no effect
cudaError_t planted = cudaSuccess;  // what the next launch fails with
std::map<std::pair<int, const void*>, int> dynamic_shared;  // by device and kernel
std::string found;  // JSON objects, a line each
std::mutex lock;

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local std::string kernel_name;
thread_local int kernel_bounds = 0;

cudaError_t fail(cudaError_t error) { return last = error; }

template <class... Args>
std::string format(const char* text, Args... args) {
  char line[1024];
  std::snprintf(line, sizeof line, text, args...);
  return line;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) out += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return out + "\"";
}

void fault(const std::string& what) { found += "{\"fault\": " + quoted(what) + "}\n"; }

// Addresses of tensors and streams, as stub/pose.py makes them: the device is in the upper 16 bits.
constexpr uint64_t kMemory = 0x5ad0, kStreams = 0x5ae0;
int device_of(uint64_t word, uint64_t kind) {
  const uint64_t top = word >> 48;
  return top >= kind && top < kind + kDevices ? int(top - kind) : -1;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* every, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const std::lock_guard<std::mutex> guard(lock);
  const uint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4 : 2;
  const char* wrong = nullptr;
  if (reinterpret_cast<uintptr_t>(map) % 64) wrong = "the map is not at a multiple of 64";
  if (rank != 2) wrong = "rank";
  if (reinterpret_cast<uintptr_t>(address) % 16) wrong = "the address is no multiple of 16";
  for (int d = 0; d < 2; d++) {
    if (sizes[d] == 0 || sizes[d] > uint64_t(1) << 32) wrong = "a size is 0 or above 2^32";
    if (box[d] == 0 || box[d] > 256) wrong = "a box of 0 or above 256";
    if (every[d] == 0 || every[d] > 8) wrong = "an element stride";
  }
  if (strides[0] % 16 || strides[0] >= uint64_t(1) << 40) wrong = "a stride that is no multiple of 16, or 2^40";
  if (strides[0] < sizes[0] * bytes) wrong = "rows overlap";
  if (box[0] * bytes % 16 || box[0] * bytes > 64) wrong = "a box's row does not fit the 64 bytes of the swizzle";
  if (wrong) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  map->opaque[0] = reinterpret_cast<uint64_t>(address);
  return CUDA_SUCCESS;
}

}  // namespace

namespace stub {

void entered(const char* name, int launch_bounds) {
  kernel_name = name;
  kernel_bounds = launch_bounds;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> guard(lock);
  if (driver < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver);
  if (value < 0 || value > devices[current].shared()) return fail(cudaErrorInvalidValue);
  if (!deaf) dynamic_shared[{current, kernel}] = value;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const unsigned char* parameters,
                   size_t bytes) {
  const std::lock_guard<std::mutex> guard(lock);
  if (driver < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver);
  if (planted != cudaSuccess) return fail(std::exchange(planted, cudaSuccess));
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || threads > uint64_t(kernel_bounds)) {
    return fail(cudaErrorInvalidConfiguration);
  }
  const auto known = dynamic_shared.find({current, kernel});
  const size_t allowed = known == dynamic_shared.end() ? 48 << 10 : size_t(known->second);
  if (config.dynamicSmemBytes > allowed) return fail(cudaErrorInvalidValue);
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const auto& asked = config.attrs[i].val.clusterDim;
    cluster = asked.x * asked.y * asked.z;
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension || !asked.x || grid.x % asked.x || grid.y % asked.y ||
        grid.z % asked.z || cluster > 8 || devices[current].capability < 90) {
      return fail(cudaErrorInvalidValue);
    }
  }
  if (bytes > 4096) return fail(cudaErrorInvalidValue);
  const uint64_t stream = reinterpret_cast<uint64_t>(config.stream);
  if (stream && device_of(stream, kStreams) != current) return fail(cudaErrorInvalidResourceHandle);

  if (kernel_name.find("similarity_sm90") != std::string::npos && devices[current].capability != 90) {
    fault(kernel_name + " on sm_" + std::to_string(devices[current].capability));
  }
  std::set<uint64_t> pointers;
  for (size_t at = 0; at + 8 <= bytes; at += 8) {
    uint64_t word;
    std::memcpy(&word, parameters + at, 8);
    const int device = device_of(word, kMemory);
    if (device >= 0) pointers.insert(word);
    if (device >= 0 && device != current) {
      fault(kernel_name + format(" runs on device %d, an operand is on %d", current, device));
    }
  }
  found += "{\"kernel\": " + quoted(kernel_name) +
           format(", \"thread\": %d, \"device\": %d, \"stream\": %llu, \"grid\": [%u, %u, %u], \"threads\": %llu, \"shared\": %zu, "
                  "\"cluster\": %u, \"pointers\": [",
                  int(gettid()), current, (unsigned long long)stream, grid.x, grid.y, grid.z, (unsigned long long)threads,
                  config.dynamicSmemBytes, cluster);
  const char* comma = "";
  for (uint64_t pointer : pointers) found += std::exchange(comma, ", ") + std::to_string(pointer);
  found += "]}\n";
  return cudaSuccess;
}

}  // namespace stub

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, value) \
  case name:           \
    return #name;
    STUB_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "what CUDA says of it"; }
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = devices[device].multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* answer) {
  const bool known = !std::strcmp(symbol, "cuTensorMapEncodeTiled") && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *answer = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// For stub/pose.py.
void stub_device(int index, int capability, int multiprocessors) { devices[index] = {capability, multiprocessors}; }
void stub_driver(int version) { driver = version; }
void stub_deaf() { deaf = true; }
void stub_plant(int error) { planted = cudaError_t(error); }
const char* stub_take() {  // until the next call
  static std::string taken;
  const std::lock_guard<std::mutex> guard(lock);
  taken = std::exchange(found, {});
  return taken.c_str();
}
void stub_reset() {
  const std::lock_guard<std::mutex> guard(lock);
  dynamic_shared.clear();
  found.clear();
  planted = cudaSuccess;
  driver = 13000;
  deaf = false;
  for (Device& device : devices) device = {};
  current = 0;
  last = cudaSuccess;
}

}  // extern "C"
