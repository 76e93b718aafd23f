// torch, built for a CPU, is told that there are CUDA devices: those of runtime.cpp. Loaded before torch is imported.
// Autograd then starts a thread for each, and makes it current there, as on a machine that has them.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

extern "C" int cudaGetDevice(int*);
extern "C" int cudaSetDevice(int);
extern "C" int cudaGetDeviceCount(int*);

namespace {

c10::DeviceIndex ask(int (*function)(int*)) {
  int answer = 0;
  function(&answer);
  return c10::DeviceIndex(answer);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, ask(cudaGetDevice)}; }
  void setDevice(c10::Device device) const override { cudaSetDevice(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { cudaSetDevice(device.index()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.index() < 0 ? getDevice() : device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return ask(cudaGetDeviceCount); }
};

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return ask(cudaGetDeviceCount); }
  DeviceIndex current_device() const override { return ask(cudaGetDevice); }
  DeviceIndex getCurrentDevice() const override { return ask(cudaGetDevice); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);  // by this name

}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace c10::impl
