// A device of type cuda for a torch that was built without CUDA: tensors without values (torch's FakeTensorMode) then
// have its device, autograd gives it a thread, and nothing is ever computed.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct OneDevice final : CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device getDevice() const override { return {kCUDA, 0}; }
  Device exchangeDevice(Device) const override { return {kCUDA, 0}; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
};

static Guard guard;
static c10::impl::DeviceGuardImplRegistrar guards(kCUDA, &guard);
// A torch that was built with CUDA has hooks of its own.
static const bool hooks = [] {
  if (!CUDAHooksRegistry()->Has("CUDAHooks"))
    CUDAHooksRegistry()->Register("CUDAHooks", [](CUDAHooksArgs) -> std::unique_ptr<CUDAHooksInterface> {
      return std::make_unique<OneDevice>();
    });
  return true;
}();

}  // namespace at
