"""Where a process computes: on its GPU, or on a CPU that was asked for or that nobody expected to be anything else.

A run that was promised GPUs and gets none would take weeks without a word: it is refused, with what is in the way.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from typing import Literal, get_args

import torch

from cogvit.config.environment import Process
from cogvit.errors import ConfigError

Device = Literal["auto", "cuda", "cpu"]

_GPU_IDS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_GPU_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")
# The oldest Linux driver for wheels of a CUDA major version, which its minor versions share. Source: its release notes.
_OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
_SMI_WAIT_S = 60.0  # a driver that has to wake eight GPUs takes 20


def local_device(asked: Device, process: Process) -> torch.device:
    """Return this process's device, a GPU made the current one; call it before a library has touched the GPUs.

    auto: a GPU where torch sees one, else the CPU if neither Slurm nor nvidia-smi speaks of GPUs. cpu hides the GPUs.
    Errors: ConfigError where a GPU was asked for or promised and cannot be had.
    """
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Megatron and DeepSpeed look for themselves
        return torch.device("cpu")
    if fault := device_fault(asked):
        raise ConfigError(fault)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = device_index(process, torch.cuda.device_count())
    try:
        torch.cuda.set_device(index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"GPU {index} of {platform.node()} cannot be used: {reason}; see nvidia-smi") from None
    return torch.device("cuda", index)


def device_flag(word: str) -> Device:
    """Return what a command's --device says. Errors: ConfigError."""
    for known in get_args(Device):
        if word == known:
            return known
    raise ConfigError(f"--device {word} must be one of {', '.join(get_args(Device))}")


def device_index(process: Process, num_visible: int) -> int:
    """Return which of the visible GPUs is this process's: the only one (Slurm's --gpus-per-task), or that of its rank.

    Errors: ConfigError when there are fewer than the machine's processes need.
    """
    if num_visible == 1:
        return 0
    if process.local_rank >= num_visible:
        raise ConfigError(
            f"LOCAL_RANK={process.local_rank} finds {num_visible} GPUs; start one process a GPU of a machine"
        )
    return process.local_rank


def device_fault(asked: Device) -> str:
    """Return why this machine has no GPU for a process that asked so, or "" where it has one or none is expected."""
    if asked == "cpu":
        return ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    promise = "--device cuda asks for a GPU" if asked == "cuda" else _promise()
    if not promise:
        return ""
    reason = why_no_gpu(
        build=torch.version.cuda or torch.version.hip,
        driver=_smi("--query-gpu=driver_version", "--format=csv,noheader"),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        told=str(said[-1].message) if said else "",
    )
    return f"{promise}, and torch {torch.__version__} on {platform.node()} sees none: {reason}, or pass --device cpu"


def why_no_gpu(build: str | None, driver: str, visible: str | None, told: str) -> str:
    """Return what keeps torch from the GPUs of a machine, and the way out.

    Args:
        build: the CUDA (or ROCm) version of the torch wheel; None for a CPU build.
        driver: what nvidia-smi says of the driver, anything at all.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
        told: what torch said when it was asked.
    """
    if build is None:
        return "it is a CPU build; install a CUDA build of torch"
    if visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides them; unset it"
    found, needed = re.match(r"[\d.]+", driver), _OLDEST_DRIVER.get(build.partition(".")[0])
    if found and needed and _numbers(found[0]) < _numbers(needed):
        return (
            f"the driver {found[0]} is too old for a wheel of CUDA {build}, which needs {needed}; update the driver or"
            " install a torch of an older CUDA"
        )
    told = " ".join(told.split()).removesuffix(".")
    return told.partition(" (Triggered internally")[0] or "the driver gives no reason; see nvidia-smi"


def device_name(device: torch.device) -> str:
    """Return what a device is called: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _promise() -> str:
    """Return who says that this process has GPUs, or ""."""
    for name in (*_GPU_IDS, *_GPU_COUNTS):
        value = os.environ.get(name, "")
        counts = (part.rpartition(":")[2] for part in value.split(","))  # as "4" or "a100:4"
        if value and (name in _GPU_IDS or any(count.isdecimal() and int(count) for count in counts)):
            return f"Slurm gave GPUs ({name}={value})"
    listed = [line for line in _smi("-L").splitlines() if line.startswith("GPU ")]
    return f"nvidia-smi lists {len(listed)} GPU{'s' if len(listed) > 1 else ''}" if listed else ""


def _smi(*words: str) -> str:
    """Return what nvidia-smi prints; "" where it is not there or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *words], capture_output=True, text=True, timeout=_SMI_WAIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part)
