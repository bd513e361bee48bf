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

# Of an H100: what large bf16 products, copies and varlen attention with its backward reach.
PRODUCT_FLOPS_PER_S, BYTES_PER_S, ATTENTION_FLOPS_PER_S = 600e12, 2.85e12, 200e12
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
        self.kernels = 0
        self.product_flops = 0
        self.other_bytes = 0  # that what is neither a product nor attention reads and writes
        self.paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside."""
        self.paused, before = True, self.paused
        yield
        self.paused = before

    def milliseconds(self, attention_flops: float) -> float:
        """What an H100 needs at least: products, bytes through memory, attention, one after the other."""
        products_s, attention_s = self.product_flops / PRODUCT_FLOPS_PER_S, attention_flops / ATTENTION_FLOPS_PER_S
        return 1000.0 * (products_s + self.other_bytes / BYTES_PER_S + attention_s)


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
            if not trace.paused:
                _weigh(trace, func, inputs, [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
            if any(x.is_cuda for x in [*inputs, *tree_leaves(out)] if isinstance(x, torch.Tensor)):
                trace.calls[name] += 1
                if name.startswith(PRODUCTS):
                    trace.products[str(inputs[0].dtype)] += 1
                if name.startswith("aten._to_copy") and inputs and inputs[0].is_cuda and not out.is_cuda:
                    trace.waits[name] += 1
            return out

    return Watcher()


def _weigh(trace: Trace, func: Any, inputs: list[Any], outputs: list[Any]) -> None:
    """Count one kernel: the flops of a product, the bytes of anything else; a view or an empty tensor is none."""
    name = str(func)
    if not any(x.is_cuda for x in outputs) or name.startswith(("aten.empty", "aten.new_empty", "prim.", *MESSAGES)):
        return
    held = {x.untyped_storage()._cdata for x in inputs}
    written = outputs if func._schema.is_mutable else [x for x in outputs if x.untyped_storage()._cdata not in held]
    if not written:
        return
    trace.kernels += 1
    if name.startswith(PRODUCTS):
        *_, left, right = inputs
        trace.product_flops += 2 * left.numel() * right.shape[-1]
    elif "attn" not in name:
        trace.other_bytes += sum(x.numel() * x.element_size() for x in [*inputs, *written])


def as_one_kernel(trace: Trace, piece: Any, *, keeps: bool) -> Any:
    """Return a function that counts as one kernel each way: it reads its inputs and writes its outputs.

    keeps: backward reads the inputs too, which are kept for it.
    """
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    def count(*groups: Any) -> None:
        if not trace.paused:
            trace.kernels += 1
            tensors = [x for group in groups for x in group if isinstance(x, torch.Tensor)]
            trace.other_bytes += sum(x.numel() * x.element_size() for x in tensors)

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spec: Any, *leaves: Any) -> Any:
            with trace.pause():
                args, kwargs = tree_unflatten(leaves, spec)
                out = piece(*args, **kwargs)
            count(leaves, out if isinstance(out, tuple) else (out,))
            ctx.spec, ctx.leaves = spec, [... if isinstance(x, torch.Tensor) else x for x in leaves]
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*(tensors if keeps else ()))
            ctx.like = None if keeps else [(x.shape, x.dtype) for x in tensors]
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with trace.pause(), torch.enable_grad():
                kept = ctx.saved_tensors if keeps else [torch.empty(s, dtype=d, device=DEVICE) for s, d in ctx.like]
                again = iter([x.detach().requires_grad_(x.is_floating_point()) for x in kept])
                leaves = [next(again) if leaf is ... else leaf for leaf in ctx.leaves]
                args, kwargs = tree_unflatten(leaves, ctx.spec)
                out = piece(*args, **kwargs)
                wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
                outs = out if isinstance(out, tuple) else (out,)
                found = iter(torch.autograd.grad(outs, wanted, grads))
            result = [next(found) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in leaves]
            count(grads, kept if keeps else (), [x for x in result if x is not None])
            return None, *result

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        return Kernel.apply(spec, *leaves)

    return run
