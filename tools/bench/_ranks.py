"""Benchmarks on several processes: fresh ranks that find each other, and contenders that take turns on them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from cogvit.config import ParallelConfig
from cogvit.config.device import Device, local_device
from cogvit.config.environment import Process
from cogvit.parallel.mesh import Mesh, start_mesh
from tools.bench._probe import Probe, probe

_CPU = torch.device("cpu")


def on_ranks(run: Callable[..., Any], ranks: int) -> list[Any]:
    """Call run(rank, rendezvous=...) on fresh processes, each of which calls `join`; returns what they return."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool,
    ):
        return list(pool.map(partial(run, rendezvous=f"{scratch}/rendezvous"), range(ranks)))


def join(rank: int, ranks: int, rendezvous: str, threads: int = 1, device: Device = "cpu") -> Mesh:
    """Meet the other ranks; all are data-parallel, on a GPU each where `device` is cuda."""
    torch.set_num_threads(threads)
    own = local_device(device, Process(rank, ranks, rank))
    store = dist.FileStore(rendezvous, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    return start_mesh(ParallelConfig(), own)


def ranks_for(asked: Sequence[int], device: Device) -> list[int]:
    """Return those numbers of processes that a machine has room for: one a GPU. Errors: ConfigError for no GPU."""
    if local_device(device, Process()).type == "cpu":
        return list(asked)
    return [ranks for ranks in asked if ranks <= torch.cuda.device_count()]


def take_turns(
    runs: Mapping[str, Callable[[], None]], rounds: int, device: torch.device = _CPU
) -> dict[str, list[Probe]]:
    """Run every contender once a round, all ranks together."""
    probes: dict[str, list[Probe]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            probes[name].append(probe(run, device))
    dist.barrier()
    return probes


def busiest(of_ranks: Sequence[Mapping[str, list[Probe]]], name: str) -> Probe:
    """Return a contender's median CPU time on the busiest rank of a round, and its largest peak."""
    by_round = list(zip(*(probes[name] for probes in of_ranks), strict=True))
    cpu_s = statistics.median(max(one.cpu_s for one in probes) for probes in by_round)
    return Probe(cpu_s, max(one.peak_bytes for probes in by_round for one in probes))
