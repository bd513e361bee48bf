// A device guard for "cuda" on a build of torch that has none: it says that there is one device and does nothing else.
// autograd asks the guard for the stream of each tensor, which is all that a tensor without data needs of a device.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace cogvit {

constexpr auto kCuda = c10::DeviceType::CUDA;
const c10::Device kOnly(kCuda, 0);
const c10::Stream kDefault(c10::Stream::DEFAULT, kOnly);

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  c10::Device exchangeDevice(c10::Device) const override { return kOnly; }
  c10::Device getDevice() const override { return kOnly; }
  c10::Stream getStream(c10::Device) const noexcept override { return kDefault; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kDefault; }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneDevice)

}  // namespace cogvit

namespace at {

// torch looks for this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
