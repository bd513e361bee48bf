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
from cogvit.parallel.mesh import Mesh, start_mesh
from tools.bench._probe import Probe, probe


def on_ranks(run: Callable[..., Any], ranks: int) -> list[Any]:
    """Call run(rank, rendezvous=...) on fresh processes, each of which calls `join`; returns what they return."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool,
    ):
        return list(pool.map(partial(run, rendezvous=f"{scratch}/rendezvous"), range(ranks)))


def join(rank: int, ranks: int, rendezvous: str, threads: int = 1) -> Mesh:
    """Meet the other ranks; all are data-parallel."""
    torch.set_num_threads(threads)
    store = dist.FileStore(rendezvous, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return start_mesh(ParallelConfig())


def take_turns(runs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[Probe]]:
    """Run every contender once a round, all ranks together."""
    probes: dict[str, list[Probe]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            probes[name].append(probe(run))
    dist.barrier()
    return probes


def busiest(of_ranks: Sequence[Mapping[str, list[Probe]]], name: str) -> Probe:
    """Return a contender's median CPU time on the busiest rank of a round, and its largest peak."""
    by_round = list(zip(*(probes[name] for probes in of_ranks), strict=True))
    cpu_s = statistics.median(max(one.cpu_s for one in probes) for probes in by_round)
    return Probe(cpu_s, max(one.peak_bytes for probes in by_round for one in probes))
