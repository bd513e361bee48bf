"""What tools.plan predicts for the demo's encoder beside what its steps take, on CPU, up to four processes.

usage: python -m tools.bench.plan [flags]
  --layouts 1x1x1,...   TPxPPxDP each; by default every kind up to four processes
  --rounds 3            each round measures the machine and then a step; the table has medians
  --out FILE            also write the record there

The machine is measured beside every step by all ranks at once, so that what else runs on it slows both: the rate of a
product of the encoder's size, and what an all-reduce moves. The share of that rate which training attains is taken from
the first layout, whose prediction is thereby right; the others are predictions. Stage 1, 128 images, fp32, gloo, one
thread a process. Ratios, not times, are what a busy machine can say something about.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version

import torch
import torch.distributed as dist

from cogvit.batch import Batch, TeacherTargets
from cogvit.config import ParallelConfig, RunConfig
from cogvit.config.flags import load_preset
from cogvit.errors import ConfigError
from cogvit.model.packing import pack_images
from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import start_mesh
from cogvit.stages import build, check_run, stage_of
from cogvit.training.engine import Engine
from configs.clusters import Cluster
from tools.bench._ranks import on_ranks
from tools.bench._record import flags_of, run_benchmark
from tools.step_cost import predict

GRID, IMAGES_PER_PACK = (6, 6), 32
TOKENS_PER_PACK = GRID[0] * GRID[1] * IMAGES_PER_PACK
TEACHER_DIMS = {"siglip2": 128, "dinov3": 128}
LAYOUTS = "1x1x1,2x1x1,1x2x1,1x1x2,4x1x1,1x4x1,1x1x4,2x2x1,2x1x2,1x2x2"
MESSAGE_BYTES = TOKENS_PER_PACK * 128 * 4  # what a tensor rank sends in a layer


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    layouts: str = LAYOUTS
    rounds: str = "3"
    out: str = ""


@dataclass(frozen=True)
class Measured:
    """One round on one rank."""

    flops: float  # per second, of matrix products alone
    bytes_per_s: float  # of all-reduces; infinite alone
    step_s: float


def run_config(layout: ParallelConfig) -> RunConfig:
    """Return the demo's stage 1 with images of one size, so that packs are full on every layout."""
    config = load_preset("demo_stage1")
    data = replace(config.data, tokens_per_pack=TOKENS_PER_PACK, images_per_pack=IMAGES_PER_PACK)
    return replace(config, data=data, parallel=layout)


def microbatches(config: RunConfig, dp_rank: int, dp_size: int) -> tuple[Batch, ...]:
    """Return a dp rank's packs of random images with random features."""
    patch_px = config.vision.patch_size
    batches = []
    for index in range(config.data.global_batch_images // IMAGES_PER_PACK // dp_size):
        generator = torch.Generator().manual_seed(dp_rank * 100 + index)
        pixels = torch.randint(0, 256, (IMAGES_PER_PACK, GRID[0] * GRID[1], 3 * patch_px**2), generator=generator)
        images = pack_images(list(pixels.to(torch.uint8)), [GRID] * IMAGES_PER_PACK)
        masked = int(mask_tokens(images, config.teachers.mask_ratio).sum())
        features = {name: torch.randn(masked, dim, generator=generator) for name, dim in TEACHER_DIMS.items()}
        batches.append(Batch(images, None, TeacherTargets(features), (None,) * IMAGES_PER_PACK))
    return tuple(batches)


def measure_flops(width: int) -> float:
    """Time the products of an MLP layer on all ranks at once."""
    x_TD, w_DF = torch.randn(TOKENS_PER_PACK, width), torch.randn(width, 2 * width)
    repeats = 40
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(repeats):
        x_TD @ w_DF
    return repeats * 2.0 * x_TD.numel() * w_DF.shape[1] / (time.perf_counter() - start_s)


def measure_bandwidth() -> float:
    """Time all-reduces of all ranks; returns what a rank sends a second, as tools.plan counts it."""
    ranks, repeats = dist.get_world_size(), 10
    if ranks == 1:
        return float("inf")
    message = torch.zeros(MESSAGE_BYTES // 4)
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(message)
    return repeats * 2 * (ranks - 1) / ranks * MESSAGE_BYTES / (time.perf_counter() - start_s)


def run_rank(rank: int, rendezvous: str, layout: ParallelConfig, ranks: int, rounds: int) -> list[Measured]:
    """Measure the machine and a step in turn."""
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    config = run_config(layout)
    mesh = start_mesh(layout)
    model, objective = build(config, mesh, TEACHER_DIMS)
    engine = Engine(model, config, mesh)
    micro = microbatches(config, mesh.dp_rank, mesh.dp_size)
    engine.step(objective, micro, 0)
    found = []
    for index in range(rounds):
        flops, bytes_per_s = measure_flops(config.vision.embed_dim), measure_bandwidth()
        dist.barrier()
        start_s = time.perf_counter()
        engine.step(objective, micro, index + 1)
        dist.barrier()
        found.append(Measured(flops, bytes_per_s, time.perf_counter() - start_s))
    return found


def measure(layout: ParallelConfig, dp: int, rounds: int) -> Measured:
    """Return the medians of the slowest ranks."""
    ranks = layout.tp * layout.pp * dp
    of_ranks = on_ranks(partial(run_rank, layout=layout, ranks=ranks, rounds=rounds), ranks)
    by_round = list(zip(*of_ranks, strict=True))
    return Measured(
        statistics.median(min(one.flops for one in here) for here in by_round),
        statistics.median(min(one.bytes_per_s for one in here) for here in by_round),
        statistics.median(max(one.step_s for one in here) for here in by_round),
    )


def predictions_s(layout: ParallelConfig, dp: int, machine: Measured, attained: float) -> tuple[float, float]:
    """Return the step time of tools.plan on a machine as it was measured, and the same without the bubble.

    Ranks that share a core lose nothing to the bubble: while a stage waits, another one has the core.
    """
    config, ranks = run_config(layout), layout.tp * layout.pp * dp
    # What a CPU's memory takes is in the share of the products' rate that training attains.
    cluster = Cluster(machine.flops, 1e12, math.inf, machine.bytes_per_s, machine.bytes_per_s, attained)
    seconds = predict(config, stage_of(config).loads(config), ranks, ranks, cluster).seconds
    return seconds.step, seconds.step - seconds.bubble


def parse_layouts(text: str) -> list[tuple[ParallelConfig, int]]:
    """Return layouts with their dp. Errors: ConfigError names one that is none."""
    found = []
    for word in text.split(","):
        sizes = word.split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise ConfigError(f"--layouts {word!r} is not TPxPPxDP")
        tp, pp, dp = map(int, sizes)
        check_run(run_config(ParallelConfig(tp=tp, pp=pp)), tp * pp * dp)
        found.append((ParallelConfig(tp=tp, pp=pp), dp))
    return found


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError for a layout that cannot run."""
    layouts, rounds = parse_layouts(arguments.layouts), int(arguments.rounds)
    yield "# tools.plan beside measured steps, on CPU"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.plan {flags_of(arguments)}`; torch {version('torch')}, deepspeed"
    cores = len(os.sched_getaffinity(0))
    yield f"{version('deepspeed')}, megatron-core {version('megatron-core')}; cores for all ranks: {cores};"
    yield f"load {os.getloadavg()[0]:.0f} at the start."
    yield ""
    yield "| tp | pp | dp | GFLOP/s of a rank | all-reduce MB/s | predicted ms | without bubble | measured ms |"
    yield "|---|---|---|---|---|---|---|---|"
    attained = 0.0
    for layout, dp in layouts:
        machine = measure(layout, dp, rounds)
        attained = attained or predictions_s(layout, dp, machine, 1.0)[0] / machine.step_s
        rates = f"{machine.flops / 1e9:.1f} | {machine.bytes_per_s / 1e6:.0f}"
        predicted = " | ".join(
            f"{1000 * seconds:,.0f} ({seconds / machine.step_s:.2f})"
            for seconds in predictions_s(layout, dp, machine, attained)
        )
        times = f"{predicted} | {1000 * machine.step_s:,.0f}"
        yield f"| {layout.tp} | {layout.pp} | {dp} | {rates} | {times} |"
    yield ""
    yield "In parentheses: over measured."
    yield f"Training attains {attained:.2f} of the rate of its products at the first layout."
    yield f"Load {os.getloadavg()[0]:.0f} at the end."


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
