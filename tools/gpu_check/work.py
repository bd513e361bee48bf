"""What the sections share: where and how large they run, packs of random images, clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvit.batch import Batch, TeacherTargets, move
from cogvit.config import (
    ActivationConfig,
    DataConfig,
    MemoryConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TeacherConfig,
    TeachersConfig,
)
from cogvit.model.config import CogViTConfig
from cogvit.model.packing import Grid, pack_images
from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import Mesh, start_mesh, stop_mesh
from cogvit.stages.cost import attention_flops, product_flops
from configs.models import cogvit_l_vision

Figures = dict[str, Any]  # values that JSON has; a list of dicts is a table
TEACHER_DIMS = {"siglip2": 1152, "dinov3": 1024}
MASK_RATIO = 0.35
SLOTS = 64
# Dense bf16 products a second by the data sheets, for a name that begins so.
_PEAK_FLOPS_PER_S = {
    "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA H800": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where the check runs and where its files go; on a CPU the same work is done small."""

    device: torch.device
    out: Path

    @property
    def small(self) -> bool:
        """Whether shapes are a test's and not a run's."""
        return self.device.type != "cuda"

    @property
    def vision(self) -> CogViTConfig:
        """cogvit_l, or a tower of its kind that a CPU does in a second."""
        shape = replace(cogvit_l_vision(), drop_path_rate=0.0)
        return replace(shape, embed_dim=64, depth=2, num_heads=2, mlp_ratio=4.0) if self.small else shape


@contextmanager
def one_mesh(setting: Setting) -> Iterator[Mesh]:
    """Be the only rank inside."""
    mesh = start_mesh(ParallelConfig(), setting.device)
    try:
        yield mesh
    finally:
        stop_mesh(mesh)


def synchronize(device: torch.device) -> None:
    """Wait for a device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Return the median of some runs by the clock, the device's work included; one more run goes first."""
    run()
    spent_ms = []
    for _ in range(rounds):
        synchronize(device)
        start_s = time.perf_counter()
        run()
        synchronize(device)
        spent_ms.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(spent_ms)


def peak_gib(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the most memory that a run holds on a GPU, weights included; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def peak_flops_per_s(device: torch.device) -> float | None:
    """Return a GPU's dense bf16 rate by its data sheet, None where this file does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in _PEAK_FLOPS_PER_S.items() if name.startswith(known)), None)


def grids_of(num_tokens: int, generator: torch.Generator) -> list[Grid]:
    """Return grids of images that fill a pack but for a padding: from 6 x 6 to 32 x 32 patches."""
    grids: list[Grid] = []
    longest = min(32, int(num_tokens**0.5))
    left = num_tokens
    while len(grids) < SLOTS:
        rows, columns = torch.randint(min(6, longest), longest + 1, (2,), generator=generator).tolist()
        if rows * columns > left:
            break
        grids.append((rows, columns))
        left -= rows * columns
    return grids


def pack_of(setting: Setting, num_tokens: int, seed: int) -> tuple[Batch, float]:
    """Return a pack of random images with random teacher features, and the FLOPs of the tower's forward on it."""
    generator = torch.Generator().manual_seed(seed)
    grids = grids_of(num_tokens, generator)
    lengths = [rows * columns for rows, columns in grids]
    patch_values = 3 * setting.vision.patch_size**2
    pixels = torch.randint(0, 256, (sum(lengths), patch_values), generator=generator, dtype=torch.uint8)
    images = pack_images(
        list(pixels.split(lengths)),
        grids,
        tokens_per_pack=num_tokens,
        images_per_pack=SLOTS,
        key_N=torch.arange(SLOTS) + 1000 * seed,
    )
    masked = int(mask_tokens(images, MASK_RATIO).sum())
    features: dict[str, Tensor] = {
        name: torch.randn(masked, dim, generator=generator) for name, dim in TEACHER_DIMS.items()
    }
    batch = Batch(images, None, TeacherTargets(features), (None,) * SLOTS)
    tower = setting.vision
    flops = sum(product_flops(tower, length) + attention_flops(tower, length, length) for length in lengths)
    return move(batch, setting.device), flops


def run_config(setting: Setting, num_tokens: int, **changes: Any) -> RunConfig:
    """Return stage 1 of the tower in bf16 with Muon, in packs of so many tokens.

    changes: fields of the run, and `recompute`.
    """
    recompute = changes.pop("recompute", "none")
    base = RunConfig(
        vision=setting.vision,
        data=DataConfig(tokens_per_pack=num_tokens, images_per_pack=SLOTS),
        # A head of another error is zero at first, and with it every gradient below.
        teachers=TeachersConfig(members=tuple(TeacherConfig(name, error="cosine") for name in TEACHER_DIMS)),
        optim=OptimConfig(lr=1e-4, adamw_lr=1e-4),
        memory=MemoryConfig(vision=ActivationConfig(recompute)),
        precision="bf16",
    )
    return replace(base, **changes)
