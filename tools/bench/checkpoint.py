"""How long a save holds up training: ours, beside a synchronous torch.save and DeepSpeed's own save, on CPU.

usage: python -m tools.bench.checkpoint [flags]
  --presets demo_stage2,stage2_reference  whose models and optimizers are saved
  --ranks 1,2                             data-parallel processes that share the state
  --rounds 5                              each round runs every contender once; the table has the medians
  --dir DIR                               where the checkpoints go; by default in the temporary directory

"Stall" is what the training thread waits for, "on disk" the time until the checkpoint is complete; a synchronous save
has one figure for both. torch.save gathers the same plain tensors and writes them on rank 0. Every contender writes
weights and moments in fp32; ours adds a SHA-256 of every file.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from cogvit.batch import DataPosition
from cogvit.config import CheckpointConfig, ParallelConfig, RunConfig
from cogvit.config.arguments import run_command
from cogvit.config.flags import load_preset
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.stages import build
from cogvit.training.checkpoint import Checkpoints
from cogvit.training.engine import Engine
from cogvit.training.folder import Folder
from cogvit.training.state import TrainState

OURS, TORCH, DEEPSPEED = "ours", "torch.save", "DeepSpeed"


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    presets: str = "demo_stage2,stage2_reference"
    ranks: str = "1,2"
    rounds: str = "5"
    dir: str = ""


@dataclass(frozen=True)
class Timing:
    """One save on the slowest rank."""

    stall_s: float
    on_disk_s: float


@dataclass(frozen=True)
class Setting:
    """What one group of processes measures."""

    preset: str
    ranks: int
    rounds: int
    directory: Path

    @property
    def config(self) -> RunConfig:
        """The preset without the parts that need files."""
        return replace(load_preset(self.preset), parallel=ParallelConfig(), init="")


def save_ours(engine: Engine, checkpoints: Checkpoints, step: int) -> Timing:
    """Save as the trainer does."""
    start_s = time.perf_counter()
    checkpoints.save(TrainState(step, DataPosition("", step), images=0, tokens=0), engine)
    stall_s = time.perf_counter() - start_s
    checkpoints.finish()
    return Timing(stall_s, time.perf_counter() - start_s)


def save_torch(engine: Engine, mesh: Mesh, path: Path) -> Timing:
    """Gather everything and write it on rank 0."""
    start_s = time.perf_counter()
    state = {key: tensor.clone() for key, tensor in engine.plain_state() if mesh.is_writer}
    if mesh.is_writer:
        torch.save(state, path)
    dist.barrier()
    seconds = time.perf_counter() - start_s
    return Timing(seconds, seconds)


def save_deepspeed(engine: Engine, directory: Path) -> Timing:
    """DeepSpeed's save_checkpoint: each rank writes its partition."""
    start_s = time.perf_counter()
    engine.zero._engine.save_checkpoint(str(directory), tag="last")
    dist.barrier()
    seconds = time.perf_counter() - start_s
    return Timing(seconds, seconds)


def run_rank(rank: int, setting: Setting) -> dict[str, list[Timing]]:
    """Join the ranks and save in turn, round after round."""
    torch.set_num_threads(1)
    rendezvous = f"file://{setting.directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=setting.ranks)
    config = setting.config
    mesh = start_mesh(config.parallel)
    model, _ = build(config, mesh, {"siglip2": 768, "dinov3": 1024})
    engine = Engine(model, config, mesh)
    timings: dict[str, list[Timing]] = {OURS: [], TORCH: [], DEEPSPEED: []}
    folder, newest = Folder(str(setting.directory / OURS)), setting.directory / "newest"
    with Checkpoints(folder, mesh, CheckpointConfig(keep_last=1), newest) as checkpoints:
        for step in range(setting.rounds + 1):
            contenders: dict[str, Callable[[], Timing]] = {
                OURS: partial(save_ours, engine, checkpoints, step),
                TORCH: partial(save_torch, engine, mesh, setting.directory / "state.pt"),
                DEEPSPEED: partial(save_deepspeed, engine, setting.directory / DEEPSPEED),
            }
            for name, contender in contenders.items():
                dist.barrier()
                timing = contender()
                if step:  # the first round warms up
                    timings[name].append(timing)
    dist.destroy_process_group()
    return timings


def measure(setting: Setting) -> dict[str, Timing]:
    """Return the median of the slowest rank by contender."""
    with ProcessPoolExecutor(setting.ranks, get_context("spawn")) as pool:
        of_ranks = [future.result() for future in [pool.submit(run_rank, r, setting) for r in range(setting.ranks)]]
    medians = {}
    for name in of_ranks[0]:
        rounds = list(zip(*(timings[name] for timings in of_ranks), strict=True))
        stall_s = statistics.median(max(timing.stall_s for timing in timings) for timings in rounds)
        on_disk_s = statistics.median(max(timing.on_disk_s for timing in timings) for timings in rounds)
        medians[name] = Timing(stall_s, on_disk_s)
    return medians


def bench(arguments: Arguments) -> int:
    """Print the table; returns the exit status."""
    print(f"torch {version('torch')}, deepspeed {version('deepspeed')}, one thread a process, fp32")
    print("| preset | state | ranks | contender | stall | on disk |\n|---|---|---|---|---|---|")
    for preset in arguments.presets.split(","):
        for ranks in map(int, arguments.ranks.split(",")):
            with tempfile.TemporaryDirectory(dir=arguments.dir or None) as directory:
                setting = Setting(preset, ranks, int(arguments.rounds), Path(directory))
                for name, timing in measure(setting).items():
                    stall, on_disk = (f"{1000 * s:,.0f} ms" for s in (timing.stall_s, timing.on_disk_s))
                    print(f"| {preset} | {count(directory)} | {ranks} | {name} | {stall} | {on_disk} |", flush=True)
    return 0


def count(directory: str) -> str:
    """Return how much one torch.save of the state holds."""
    return f"{(Path(directory) / 'state.pt').stat().st_size / 1e6:,.0f} MB"


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, bench))
