"""What the machine is, and what its GPU reaches on products and copies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from tools.gpu_check.work import Figures, Setting, peak_flops_per_s, timed_ms

PACKAGES = (
    "torch", "triton", "numpy", "megatron-core", "deepspeed", "pyarrow", "safetensors", "webdataset", "simplejpeg",
    "xxhash", "pydantic", "transformers", "timm", "ray", "wandb", "pytest",
)  # fmt: skip


def machine(setting: Setting) -> Figures:
    """Name the device, its driver and the software; a package that is missing is said to be."""
    found: Figures = {
        "device": str(setting.device),
        "host": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("CUDA_", "NCCL_"))},
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "nvidia_smi": _nvidia_smi(),
        }
    return found


def ceilings(setting: Setting) -> Figures:
    """Measure square products and copies: what any step is held against."""
    device, size = setting.device, 256 if setting.small else 8192
    products = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        spent_ms = timed_ms(lambda left=left, right=right: left @ right, device, rounds=10)  # type: ignore[misc]
        products.append({"dtype": name, "size": size, "ms": spent_ms, "tflops": 2 * size**3 / spent_ms / 1e9})
    num_bytes = 2**22 if setting.small else 2**30
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not setting.small)
    again = torch.empty_like(here)
    copies = [
        {"copy": name, "gb_per_s": factor * num_bytes / timed_ms(copy, device) / 1e6}
        for name, factor, copy in (
            ("device to device, read and written", 2, lambda: again.copy_(here)),
            ("pinned host to device", 1, lambda: here.copy_(host, non_blocking=True)),
            ("device to pinned host", 1, lambda: host.copy_(here, non_blocking=True)),
        )
    ]
    sheet = peak_flops_per_s(device)
    return {"products": products, "copies": copies, "bf16_tflops_by_data_sheet": sheet and sheet / 1e12}


def bf16_flops_per_s(setting: Setting) -> float:
    """Return what a large bf16 product reaches here."""
    size = 256 if setting.small else 8192
    left, right = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
    return 2e3 * size**3 / timed_ms(lambda: left @ right, setting.device, rounds=10)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _nvidia_smi() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "missing"
    query = "--query-gpu=driver_version,pstate,temperature.gpu,power.limit,clocks.max.sm"
    done = subprocess.run([command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr.strip()
