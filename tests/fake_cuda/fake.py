"""A CUDA device without data, on a build of torch without CUDA: real dtypes, devices, shapes and choices of kernels.

`pretend` must run before torch is imported, which asks once and for all whether there are devices. Under
`on_fake_cuda` every tensor is a FakeTensor of "cuda:0".
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GUARD = Path(__file__).with_name("guard.cpp")
DEVICE = "cuda:0"


def build_guard(compiler: str, library: Path) -> None:
    """Compile the device guard; 3 s."""
    torch_dir = _torch_dir()
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_dir}/include", f"-L{torch_dir}/lib"]
    command = [compiler, *flags, str(GUARD), "-o", str(library), "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)


def _torch_dir() -> Path:
    found = importlib.util.find_spec("torch")  # without importing it
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def pretend(library: Path) -> None:
    """Load the guard and let torch.cuda answer as if it had one device."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(_torch_dir() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    import torch

    cuda, generator = torch.cuda, torch.Generator()
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, device=torch.device(DEVICE))
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: False
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: torch.device(DEVICE)
    cuda.set_device = lambda device: None
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.synchronize = lambda device=None: None
    cuda._lazy_init = lambda: None
    cuda.default_generators = (generator,)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": generator.get_state()
        module.set_rng_state = lambda state, device="cuda": None
        module.manual_seed = lambda seed: None


def world_of(size: int) -> None:
    """Be rank 0 of a world whose messages go nowhere."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


class Trace:
    """What ran on the device, and what was saved for backward."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.calls: Counter[str] = Counter()  # by operator
        self.products: Counter[str] = Counter()  # matrix products by dtype
        self.waits: Counter[str] = Counter()  # of the host for the device, by operator
        self.collectives: list[tuple[str, tuple[str, ...]]] = []  # name and dtypes of what goes in and out
        self.saved_bytes = 0


@contextmanager
def on_fake_cuda(trace: Trace) -> Iterator[None]:
    """Run the body on tensors without data and fill in the trace."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _watcher(trace):
        yield


# What makes the host wait for the device, and what is answered where no data is there to tell.
WAITS = ("aten._local_scalar_dense", "aten.nonzero.", "aten.bincount", "aten.equal", "aten.unique", "aten._unique")
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")
MESSAGES = ("c10d.", "c10d_functional.", "_c10d_functional.")


def _watcher(trace: Trace) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = str(func)
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if any(x.is_cuda for x in inputs):
                if name.startswith(WAITS):
                    trace.waits[name] += 1
                if name.startswith(MESSAGES):
                    trace.collectives.append((name, tuple(str(x.dtype) for x in inputs)))
                if name.startswith("aten._local_scalar_dense"):
                    return 1.0 if inputs[0].is_floating_point() else 1
            out = func(*args, **kwargs)
            if any(x.is_cuda for x in [*inputs, *tree_leaves(out)] if isinstance(x, torch.Tensor)):
                trace.calls[name] += 1
                if name.startswith(PRODUCTS):
                    trace.products[str(inputs[0].dtype)] += 1
                if name.startswith("aten._to_copy") and inputs and inputs[0].is_cuda and not out.is_cuda:
                    trace.waits[name] += 1
            return out

    return Watcher()
