"""The same training steps with targets that are there, that a store has, and that a slow teacher's actor sends."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cogvit import TeacherWrapper
from cogvit.batch import Batch, DataPosition, SampleRef, StepBatch, TeacherTargets
from cogvit.config import DataConfig, OptimConfig, RunConfig, TeacherConfig, TeachersConfig
from cogvit.model.packing import pack_images
from cogvit.objective.masking import mask_tokens
from cogvit.stages import build
from cogvit.teacher.actors import TeacherPool, connect, plan_cluster
from cogvit.teacher.shard import write_shard
from cogvit.teacher.store import Maker, StoreFeatures, header_of, path_of, writing
from cogvit.teacher.stream import FeatureSource, Grid, Pixels, attach_targets
from cogvit.training.engine import Engine
from configs.models import Size, reference_vision
from tools.bench._ranks import join, on_ranks

SYNTHETIC, STORE, ONLINE = "synthetic", "store", "online"
LATENCY = 0.9  # of a step with synthetic targets
TEACHER = TeacherConfig("sleeper", "tools.bench._overlap:sleeper")
GRID: Grid = (14, 14)
DIM = 768
PATCH_PX = 16
MASK_RATIO = 0.35
_SLEEP_S = "COGVIT_BENCH_SLEEP_S"
_DISTINCT_STEPS = 8
_IN_FLIGHT_STEPS = 2
_WARM_STEPS = _IN_FLIGHT_STEPS + 1  # of a turn: their features were asked for before it began
_SHARD, _CONTENTS = "shard.tar", "0" * 64


@dataclass(frozen=True)
class Work:
    """What is trained."""

    size: Size
    images: int  # of a step
    steps: int  # of a turn, that count
    rounds: int


class Sleeper(nn.Module):
    """A teacher that takes its time and no processor."""

    def __init__(self, latency_s: float) -> None:
        super().__init__()
        self.latency_s = latency_s

    def forward(self, images: Tensor) -> Tensor:
        """Return zeros [B, N, DIM] after the latency."""
        time.sleep(self.latency_s)
        return images.new_zeros(len(images), images.shape[2] * images.shape[3] // PATCH_PX**2, DIM)


def sleeper() -> TeacherWrapper:
    """Return the teacher; its latency is in the environment, which actors inherit."""
    return TeacherWrapper(Sleeper(float(os.environ[_SLEEP_S])), DIM, patch_size=PATCH_PX)


def blank(sample: SampleRef, key: int | None, size_hw_px: tuple[int, int]) -> Pixels:
    """Return an image without decoding one: what a teacher's images cost is the data plane's benchmark."""
    return np.zeros((*size_hw_px, 3), np.uint8)


def step_of(work: Work, number: int, patch_px: int) -> StepBatch:
    """Return one step's random images, without targets."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (work.images, GRID[0] * GRID[1], 3 * patch_px**2), generator=generator)
    first = number * work.images
    images = pack_images(
        list(pixels.to(torch.uint8)), [GRID] * work.images, key_N=torch.arange(first, first + work.images)
    )
    samples = tuple(SampleRef(first + slot, _SHARD, 0, 0) for slot in range(work.images))
    return StepBatch((Batch(images, None, None, samples),), DataPosition("plan", number))


def with_targets(step: StepBatch) -> StepBatch:
    """Give a step random targets."""
    (batch,) = step.micro
    masked = int(mask_tokens(batch.images, MASK_RATIO).sum())
    return replace(step, micro=(replace(batch, targets=TeacherTargets({TEACHER.name: torch.randn(masked, DIM)})),))


def fill_store(directory: Path, images: int) -> StoreFeatures:
    """Write random features of all images in fp16 and open them."""
    maker = Maker("f" * 64, "fp32", DIM)
    with writing(directory, {TEACHER.name: maker}, "fp16"):
        features = [torch.randn(GRID[0] * GRID[1], DIM) for _ in range(images)]
        header = header_of(maker, "fp16", _CONTENTS)
        write_shard(path_of(directory, TEACHER.name, _SHARD, _CONTENTS), header, list(range(images)), features)
    return StoreFeatures(directory, {TEACHER.name: maker}, {_SHARD: _CONTENTS})


def run_config(work: Work) -> RunConfig:
    """Return the run that is measured."""
    return RunConfig(
        vision=reference_vision(work.size),
        data=DataConfig(tokens_per_pack=work.images * GRID[0] * GRID[1], images_per_pack=work.images),
        teachers=TeachersConfig(members=(TEACHER,)),
        optim=OptimConfig(name="adamw", lr=1e-4),
    )


def turn(step: Callable[[StepBatch], None], batches: Iterator[StepBatch], count: int) -> float:
    """Take steps; returns the seconds a step, waits for batches included, of all but the first ones.

    Of the whole turn: where features are late, every few steps wait for them and the others do not.
    """
    start_s = 0.0
    for number in range(_WARM_STEPS + count):
        if number == _WARM_STEPS:
            start_s = time.perf_counter()
        step(next(batches))
    return (time.perf_counter() - start_s) / count


def run_rank(rank: int, rendezvous: str, work: Work, directory: Path) -> dict[str, list[float]]:
    """Run the contenders in turn; returns the seconds a step of each turn, and the teacher's latency as "latency"."""
    mesh = join(rank, 1, rendezvous)
    config = run_config(work)
    model, objective = build(config, mesh, {TEACHER.name: DIM})
    engine = Engine(model, config, mesh)
    steps = [step_of(work, number, config.vision.patch_size) for number in range(_DISTINCT_STEPS)]

    def attached(source: FeatureSource) -> Iterator[StepBatch]:
        return attach_targets(cycle(steps), source, mask_ratio=MASK_RATIO, in_flight_steps=_IN_FLIGHT_STEPS)

    def take(step: StepBatch) -> None:
        engine.step(objective, step.micro, len(steps))

    batches: dict[str, Iterator[StepBatch]] = {SYNTHETIC: cycle([with_targets(step) for step in steps])}
    alone_s = [turn(take, batches[SYNTHETIC], work.steps) for _ in range(work.rounds)]
    latency_s = LATENCY * statistics.median(alone_s)
    os.environ[_SLEEP_S] = str(latency_s)
    with ExitStack() as stack:
        stack.enter_context(connect(plan_cluster(""), 1))
        batches[STORE] = attached(fill_store(directory, _DISTINCT_STEPS * work.images))
        batches[ONLINE] = attached(TeacherPool(config.teachers, blank))
        found: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(work.rounds):
            for name, stream in batches.items():
                found[name].append(turn(take, stream, work.steps))
    return found | {"latency": [latency_s]}


def overlap_lines(work: Work, directory: Path) -> Iterator[str]:
    """Yield a row for each source of targets."""
    (found,) = on_ranks(partial(run_rank, work=work, directory=directory), 1)
    medians = {name: statistics.median(times) for name, times in found.items()}
    base = {SYNTHETIC: SYNTHETIC, STORE: SYNTHETIC, ONLINE: STORE}
    labels = {
        SYNTHETIC: "synthetic, in memory",
        STORE: "store",
        ONLINE: f"actor that takes {medians['latency'] / medians[SYNTHETIC]:.2f} of a step",
    }
    for name, label in labels.items():
        yield f"| {label} | {1000 * medians[name]:,.1f} | {medians[name] / medians[base[name]]:.3f} of {base[name]} |"
