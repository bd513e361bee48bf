"""Ranks of nccl on this machine's GPUs, or one on its CPU; each call starts fresh processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def run_ranks(
    fn: Callable[..., Any], world: int, args: tuple[Any, ...], *, cuda: bool = True, timeout_s: float = 300.0
) -> list[Any]:
    """Return what fn(rank, world, *args) returns on every rank; fn is a top-level function, args and results pickle.

    cuda=False hides the GPUs, so that fn runs on the CPU. Errors: the first exception of a rank.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world_environ = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environ = world_environ if cuda else {**world_environ, "CUDA_VISIBLE_DEVICES": ""}
    # The environment comes before anything that is unpickled, for that imports torch.
    with ProcessPoolExecutor(world, get_context("spawn"), _enter, (environ,)) as pool:
        calls = [pool.submit(_call, fn, rank, world, args) for rank in range(world)]
        return [call.result(timeout_s) for call in calls]


def _enter(environ: dict[str, str]) -> None:
    os.environ.update(environ)


def _call(fn: Callable[..., Any], rank: int, world: int, args: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return fn(rank, world, *args)
