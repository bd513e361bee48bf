"""Real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from cogvit.training.signals import StopRequest
from tests.pool import Pool

WORKER = """
import sys, time
from cogvit.training.signals import StopRequest
with StopRequest() as stop:
    print("listening", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    if sys.argv[1] == "saving":
        time.sleep(60)
sys.exit(3)
"""


@contextmanager
def worker(behavior: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", WORKER, behavior], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "listening\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    with worker("leaving") as process:
        process.send_signal(number)
        assert process.wait(timeout=30) == 3


def test_later_signal_ends_at_once_with_requeue_status() -> None:
    with worker("saving") as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "asked\n"
        time.sleep(2.2)
        start_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
        assert time.monotonic() - start_s < 5


def test_echo_of_the_same_request_does_not_cut_the_checkpoint_short() -> None:
    with worker("saving") as process:
        process.send_signal(signal.SIGINT)  # the terminal
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)  # torchrun, a moment later
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.requested
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def stop_after_signal_to_one(rank: int, world: int) -> list[bool]:
    """Only rank 1 is signaled; returns what each of two agreements said."""

    def all_reduce_max(value: int) -> int:
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    with StopRequest() as stop:
        before = stop.agreed(all_reduce_max)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [before, stop.agreed(all_reduce_max)]


def test_all_ranks_agree(pool: Pool) -> None:
    assert pool.run(stop_after_signal_to_one, 3) == [[False, True]] * 3


def wait_for_a_peer(rank: int, world: int) -> None:
    """Rank 0 is signaled twice inside a collective that rank 1 does not enter for a long while."""
    with StopRequest():
        for delay_s in (0.5, 3.0) if rank == 0 else ():
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(40.0 * rank)
        dist.all_reduce(torch.zeros(1))


def test_the_second_signal_is_heard_inside_a_collective(pool: Pool) -> None:
    start_s = time.monotonic()
    with pytest.raises(ChildProcessError, match="rank 0 died with status 75"):
        pool.run(wait_for_a_peer, 2)
    assert time.monotonic() - start_s < 30
