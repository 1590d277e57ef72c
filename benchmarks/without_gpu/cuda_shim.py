"""A CUDA device that does nothing, registered in C++; importing this module before torch compiles and loads it.

It has a device guard for CUDA, and CUDA hooks that report one device: without them autograd asks the driver for a stream. Imported
after torch, it does nothing, and pretend_cuda.pretend raises.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  static Device here() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, here()); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
std::unique_ptr<at::CUDAHooksInterface> make(at::CUDAHooksArgs) { return std::make_unique<Hooks>(); }
bool registered = (at::CUDAHooksRegistry()->Register("CUDAHooks", make, "", REGISTRY_PREFERRED), true);
}
extern "C" void pretend_cuda() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
}
"""


def load() -> ctypes.CDLL:
    """Compile and load the shim. The first CUDAHooks registered with preference win, so torch must be imported later."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    folder = Path(tempfile.mkdtemp())
    (folder / "shim.cpp").write_text(SHIM)
    libraries = [
        f"-L{root}/lib",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{root}/lib",
        "-Wl,--unresolved-symbols=ignore-in-shared-libs",
    ]
    options = ["-shared", "-fPIC", "-O1", "-std=c++20", "-w", f"-I{root}/include"]
    subprocess.run(["g++", *options, folder / "shim.cpp", "-o", folder / "shim.so", *libraries], check=True)
    return ctypes.CDLL(str(folder / "shim.so"), ctypes.RTLD_GLOBAL)


SHIM_LIBRARY = None if "torch" in sys.modules else load()
