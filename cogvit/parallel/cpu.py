"""Lets Megatron-core and DeepSpeed run where there is no CUDA; does nothing where there is.

Megatron-core 0.16 spells "cuda" in its schedule, its point-to-point buffers and its recompute RNG, and DeepSpeed
compiles a shared-memory op at start. These few redirections are the only patches of third-party code in the project,
and the parity tests run through them. `prepare_process` must run before megatron or deepspeed is imported.
"""

from __future__ import annotations

import logging
import os
import types
import warnings
from typing import Any

import torch


class _TorchOnCpu(types.ModuleType):
    """Stands for `torch` inside Megatron's schedule file, where device="cuda" is written out."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        """Return what torch.zeros returns, on the CPU where "cuda" was asked for."""
        return torch.zeros(*size, dtype=dtype, device="cpu" if device == "cuda" else device)


def prepare_process() -> None:
    """Make this process able to import and run megatron and deepspeed on its device; idempotent."""
    # Megatron warns at import, in every rank, of each optional package that is not installed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # torch renames collectives that DeepSpeed and Megatron call by their old names, each with a warning in mid-run.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # It also logs, for every layer, that it does not know an MLP class of ours.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if torch.cuda.current_device is _current_device:  # type: ignore[comparison-overlap]
        return
    _redirect_torch()
    _redirect_megatron()
    _forbid_deepspeed_builds()


def _current_device() -> torch.device:
    return torch.device("cpu")


def _redirect_torch() -> None:
    custom_fwd, custom_bwd = torch.amp.custom_fwd, torch.amp.custom_bwd
    torch.amp.custom_fwd = lambda fwd=None, *, device_type, cast_inputs=None: custom_fwd(
        fwd, device_type="cpu", cast_inputs=cast_inputs
    )
    torch.amp.custom_bwd = lambda bwd=None, *, device_type: custom_bwd(bwd, device_type="cpu")
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]


def _redirect_megatron() -> None:
    # Megatron decorates its fused functions, of which we call none; that alone would load the compiler: 1.7 s of 5.
    compiler, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core.tensor_parallel.random as megatron_random
        from megatron.core.pipeline_parallel import schedules
    finally:
        torch.compile = compiler

    schedules.torch = _TorchOnCpu()
    megatron_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _forbid_deepspeed_builds() -> None:
    """DeepSpeed compiles this op in init_distributed (57 s); a killed build leaves a lock on which later runs hang."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
