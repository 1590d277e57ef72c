"""Makes torch, Dynamo, Inductor and Triton see one H100, with an H100's properties wherever they ask.

scaled_dot_product_attention becomes the op that it would select there (cuDNN's), since it selects in C++ by the real card.
"""

import warnings
from types import SimpleNamespace

import torch
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor_config
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget

from benchmarks.without_gpu import cuda_shim

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120, is_integrated=0,
    is_multi_gpu_board=0, gcnArchName="", uuid="0", pci_bus_id=0, pci_device_id=0, pci_domain_id=0,
)  # fmt: skip


class Driver:
    """A driver that answers what Triton asks before and after it compiles."""

    target = GPUTarget("cuda", 90, 32)
    utils = SimpleNamespace(
        get_device_properties=lambda device: dict(max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32)
    )
    get_current_target = lambda self: self.target
    get_current_device = lambda self: 0
    set_current_device = lambda self, device: None
    get_current_stream = lambda self, device: 0
    get_device_capability = lambda self, device=0: (9, 0)
    get_device_interface = lambda self: torch.cuda
    get_active_torch_device = lambda self: torch.device("cuda", 0)


def attention_op(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    """Call the op that F.scaled_dot_product_attention selects on an H100 in bf16 if cuDNN's kernel is allowed, with autocast."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[0]


ON_CPU: list[torch.library.Library] = []  # must outlive `pretend`


def pretend() -> None:
    """Make torch, Inductor and Triton see an H100; the few constants that Inductor's passes make there are on the CPU.

    To be called once per process, which cannot use a real GPU from then on. Raises RuntimeError if the shim is not loaded.
    """
    if cuda_shim.SHIM_LIBRARY is None:
        raise RuntimeError("torch was imported before cuda_shim: import that first")
    cuda_shim.SHIM_LIBRARY.pretend_cuda()  # after torch was imported: a CUDA build registers its own guard then
    ON_CPU.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build has kernels for these
        for name, empty in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
            ON_CPU[0].impl(
                name, lambda *sizes, dtype=None, empty=empty, **options: empty(*sizes, dtype=dtype, device="cpu"), "CUDA"
            )
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") of a fake mode must not reach the driver
    cuda, state = torch.cuda, torch.zeros(16, dtype=torch.uint8)
    answers = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, get_device_properties=lambda d=None: H100,
        get_device_capability=lambda d=None: (9, 0), get_device_name=lambda d=None: H100.name, _lazy_init=lambda: None,
        synchronize=lambda d=None: None, is_bf16_supported=lambda including_emulation=True: True, set_device=lambda d: None,
        get_rng_state=lambda device="cuda": state, set_rng_state=lambda state, device="cuda": None,
        _exchange_device=lambda d: 0, _maybe_exchange_device=lambda d: 0,
        is_current_stream_capturing=lambda: False, mem_get_info=lambda d=None: (80 << 30, 80 << 30),
        memory_allocated=lambda d=None: 0,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, answer)
        for interface in (CudaInterface, CudaInterface.Worker):
            if hasattr(interface, name):
                setattr(interface, name, staticmethod(answer))
    CudaInterface.get_raw_stream = staticmethod(lambda device: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    torch.accelerator.is_available = lambda: False  # Dynamo would ask it for a stream
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"
    fake_tensor.init_gpu_context = lambda *args: None
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    F.scaled_dot_product_attention = attention_op
    for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "zeros_", "ones_", "constant_"):
        setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)  # nothing to fill
    inductor_config.force_disable_caches = True
    inductor_config.shape_padding = False  # it would time the GEMM of 1001 classes; those of a block need no padding
    torch._functorch.config.enable_autograd_cache = False
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):  # they load what they compile
        if hasattr(inductor_config, name):
            setattr(inductor_config, name, False)
