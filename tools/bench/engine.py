"""What a training step costs beside a bare PyTorch loop of the same model, and beside DDP, on a CPU or GPUs.

usage: python -m tools.bench.engine [flags]
  --size small     tiny, small or base: the encoder, of the reference family
  --images 4       images of 14 x 14 patches in a microbatch
  --micro 2        microbatches of a step
  --device cpu     cpu or cuda
  --rounds 5       each round runs every contender once; the table has the medians
  --out FILE       also write the record there

Stage 1 with two teachers, AdamW, clipping, fp32, one thread a process. The bare loop is the plain CogViT with the same
heads and loss under torch.optim.AdamW and clip_grad_norm_; with two processes it is wrapped in DistributedDataParallel
and ours shards the optimizer by ZeRO-1. CPU seconds are of the busiest process, on a GPU those of the clock; the split
of our step is by the clock.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogvit.batch import Batch, TeacherTargets, move
from cogvit.config import (
    ActivationConfig,
    DataConfig,
    MemoryConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    TeachersConfig,
)
from cogvit.config.device import Device, device_flag
from cogvit.errors import ConfigError
from cogvit.model.packing import pack_images
from cogvit.model.vit import CogViT
from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import Mesh
from cogvit.stages import build
from cogvit.training.engine import Engine
from configs.models import Size, reference_vision
from tools.bench._probe import Probe, probe
from tools.bench._ranks import busiest, join, on_ranks, ranks_for, take_turns
from tools.bench._record import flags_of, run_benchmark

GRID = (14, 14)
TEACHER_DIMS = {"siglip2": 768, "dinov3": 768}
MASK_RATIO = 0.35
OURS, BARE = "CogViT", "bare loop"
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    size: str = "small"
    images: str = "4"
    micro: str = "2"
    device: str = "cpu"
    rounds: str = "5"
    out: str = ""


@dataclass(frozen=True)
class Work:
    """One step: its model and what each process trains on."""

    size: Size
    images: int
    micro: int
    device: Device = "cpu"


def run_config(work: Work, recompute: str = "none") -> RunConfig:
    """Return the run that is measured."""
    return RunConfig(
        vision=reference_vision(work.size),
        data=DataConfig(tokens_per_pack=work.images * GRID[0] * GRID[1], images_per_pack=work.images),
        teachers=TeachersConfig(members=tuple(TeacherConfig(name) for name in TEACHER_DIMS)),
        optim=OptimConfig(name="adamw", lr=1e-4),
        memory=MemoryConfig(vision=ActivationConfig(recompute)),  # type: ignore[arg-type]
    )


def microbatches(work: Work, patch_px: int, mesh: Mesh) -> tuple[Batch, ...]:
    """Return random images with random teacher features."""
    rank = mesh.dp_rank
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for index in range(work.micro):
        pixels = torch.randint(0, 256, (work.images, GRID[0] * GRID[1], 3 * patch_px**2), generator=generator)
        key = torch.arange(work.images) + 1000 * (rank * work.micro + index)
        images = pack_images(list(pixels.to(torch.uint8)), [GRID] * work.images, key_N=key)
        masked = int(mask_tokens(images, MASK_RATIO).sum())
        features = {name: torch.randn(masked, dim, generator=generator) for name, dim in TEACHER_DIMS.items()}
        batches.append(Batch(images, None, TeacherTargets(features), (None,) * work.images))
    return tuple(move(batch, mesh.device) for batch in batches)


class BareModel(nn.Module):
    """The plain encoder with one head per teacher."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.vision = CogViT(config.vision)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.vision.embed_dim, dim) for name, dim in TEACHER_DIMS.items()}
        )

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of one microbatch."""
        assert batch.targets is not None
        mask_T = mask_tokens(batch.images, MASK_RATIO)
        x_MD = self.vision.forward_packed(batch.images, mask_T).patch_TD[mask_T]
        losses = [F.smooth_l1_loss(self.heads[name](x_MD), y) for name, y in batch.targets.features.items()]
        return torch.stack(losses).sum()


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro: tuple[Batch, ...]) -> None:
    """Accumulate the microbatches, clip, update."""
    for index, batch in enumerate(micro):
        last = index == len(micro) - 1
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            (model(batch) / len(micro)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def start_ours(work: Work, mesh: Mesh, recompute: str = "none") -> Callable[[], None]:
    """Return one of our steps."""
    config = run_config(work, recompute)
    model, objective = build(config, mesh, TEACHER_DIMS)
    engine = Engine(model, config, mesh)
    micro = microbatches(work, config.vision.patch_size, mesh)

    def step() -> None:
        engine.step(objective, micro, 200)

    return step


def start_bare(work: Work, mesh: Mesh) -> Callable[[], None]:
    """Return one step of the bare loop."""
    config = run_config(work)
    model: nn.Module = BareModel(config).to(mesh.device)
    if mesh.dp_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    micro = microbatches(work, config.vision.patch_size, mesh)
    return lambda: bare_step(model, optimizer, micro)


def compare(rank: int, ranks: int, rendezvous: str, work: Work, rounds: int) -> dict[str, list[Probe]]:
    """Run ours and the bare loop in turn."""
    mesh = join(rank, ranks, rendezvous, device=work.device)
    steps: dict[str, Callable[[], None]] = {OURS: start_ours(work, mesh), BARE: start_bare(work, mesh)}
    for step in steps.values():
        step()
    return take_turns(steps, rounds, mesh.device)


def split(rank: int, ranks: int, rendezvous: str, work: Work, rounds: int) -> list[dict[str, float]]:
    """Time the parts of our step."""
    mesh = join(rank, ranks, rendezvous, device=work.device)
    config = run_config(work)
    model, objective = build(config, mesh, TEACHER_DIMS)
    engine = Engine(model, config, mesh)
    micro = microbatches(work, config.vision.patch_size, mesh)
    forward_s: list[float] = []
    model.get_submodule("vision").register_forward_pre_hook(lambda *_: forward_s.append(-time.perf_counter()))
    model.get_submodule("vision").register_forward_hook(lambda *_: forward_s.append(time.perf_counter()))
    parts = []
    for _ in range(rounds + 1):
        forward_s.clear()
        report = engine.step(objective, micro, 200)
        forward = sum(forward_s)
        parts.append(
            {
                "forward": forward,
                "backward": report.forward_backward_s - forward,
                "reduction": report.reduction_s,
                "optimizer": report.optimizer_s,
            }
        )
    return parts[1:]


def recompute_peaks(rank: int, ranks: int, rendezvous: str, work: Work, rounds: int) -> dict[str, list[Probe]]:
    """Measure one step under each choice of recompute."""
    mesh = join(rank, ranks, rendezvous, device=work.device)
    found = {}
    for recompute in RECOMPUTE:
        step = start_ours(work, mesh, recompute)
        step()
        found[recompute] = [probe(step, mesh.device) for _ in range(rounds)]
        del step
    return found


def measure(run: Callable[..., Any], ranks: int, work: Work, rounds: int) -> list[Any]:
    """Call one of the measurements on fresh processes."""
    return on_ranks(partial(run, ranks=ranks, work=work, rounds=rounds), ranks)


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError for an unknown size or a flag that is no number."""
    if arguments.size not in get_args(Size):
        raise ConfigError(f"--size {arguments.size} is none of {get_args(Size)}")
    if not all(value.isdigit() for value in (arguments.images, arguments.micro, arguments.rounds)):
        raise ConfigError("--images, --micro and --rounds are whole numbers")
    device, rounds = device_flag(arguments.device), int(arguments.rounds)
    work = Work(cast(Size, arguments.size), int(arguments.images), int(arguments.micro), device)
    worlds = ranks_for((1, 2), device)
    tokens = work.images * work.micro * GRID[0] * GRID[1]
    yield f"# The training step beside a bare loop, on {device}"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.engine {flags_of(arguments)}`; torch {version('torch')}, deepspeed"
    yield f"{version('deepspeed')}, megatron-core {version('megatron-core')}, one thread a process, fp32."
    yield f"The {work.size} encoder, {work.micro} microbatches of {work.images} images: {tokens:,} tokens per process."
    yield ""
    yield "| processes | step | s of the busiest | tokens per s | against the bare loop |"
    yield "|---|---|---|---|---|"
    for ranks in worlds:
        probes = measure(compare, ranks, work, rounds)
        times = {name: busiest(probes, name).cpu_s for name in (OURS, BARE)}
        for name, seconds in times.items():
            label = {OURS: "CogViT, ZeRO-1", BARE: "DDP" if ranks > 1 else BARE}[name]
            yield f"| {ranks} | {label} | {seconds:.2f} | {tokens / seconds:,.0f} | {seconds / times[BARE]:.2f} |"
    yield ""
    yield "| processes | forward s | backward s | reduction s | optimizer s |"
    yield "|---|---|---|---|---|"
    for ranks in worlds:
        parts = measure(split, ranks, work, rounds)[0]
        medians = [statistics.median(part[name] for part in parts) for name in parts[0]]
        yield f"| {ranks} | " + " | ".join(f"{value:.3f}" for value in medians) + " |"
    yield ""
    yield "| vision recompute | s | peak MiB of a step |"
    yield "|---|---|---|"
    for recompute, probes_of in measure(recompute_peaks, 1, replace(work, micro=1), rounds)[0].items():
        cpu_s = statistics.median(one.cpu_s for one in probes_of)
        yield f"| {recompute} | {cpu_s:.2f} | {statistics.median(one.peak_bytes for one in probes_of) / 2**20:,.0f} |"


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
