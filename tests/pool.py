"""One pool of gloo workers for the whole test run.

Importing torch, megatron and deepspeed costs 6-10 s a process. A fork server imports them once; every call then forks
fresh ranks from it in milliseconds. Ranks live for one call, so no state of torch.distributed, megatron or deepspeed
can leak from test to test, and a hang or crash costs nothing but the call.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


class PoolTimeout(Exception):
    """A call did not finish in time; the message has the stack of every rank that was still running."""


@dataclass(frozen=True)
class Call:
    """What one rank is asked to do."""

    fn: Callable[..., Any]
    rank: int
    world: int
    args: tuple[Any, ...]
    timeout_s: float
    scratch: Path  # of this call: rendezvous and stacks

    @property
    def stack_file(self) -> Path:
        return self.scratch / f"stack_{self.rank}.txt"


@dataclass(frozen=True)
class Outcome:
    """What one rank answers."""

    value: Any
    error: BaseException | None


@dataclass(frozen=True)
class Rank:
    """The parent's view of a running rank."""

    call: Call
    process: BaseProcess
    pipe: Connection


class Pool:
    """Runs functions on a few ranks that have joined a gloo process group."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preload"])
        first = self._context.Process(target=os.getpid)  # returns when the fork server has done its imports
        first.start()
        first.join()

    def run(
        self, fn: Callable[..., Any], world: int = 2, args: tuple[Any, ...] = (), *, timeout_s: float = 100.0
    ) -> list[Any]:
        """Return what fn(rank, world, *args) returns on every rank; fn is a top-level function, args pickle.

        Errors: the first exception of a rank, with that rank's traceback as a note; PoolTimeout after timeout_s.
        """
        with tempfile.TemporaryDirectory(prefix="pool_") as scratch:
            calls = [Call(fn, rank, world, args, timeout_s, Path(scratch)) for rank in range(world)]
            ranks = [self._start(call) for call in calls]
            try:
                return _collect(ranks, time.monotonic() + timeout_s)
            finally:
                _end(ranks)

    def _start(self, call: Call) -> Rank:
        here, there = self._context.Pipe()
        # Pickled here: multiprocessing's own pickler would pass tensors as shared memory of a process about to exit.
        process = self._context.Process(target=_run_rank, args=(there, pickle.dumps(call)))
        process.start()
        there.close()
        return Rank(call, process, here)


def _end(ranks: list[Rank]) -> None:
    """Kill what is left of the ranks and of the processes they started: all, before waiting for any to be gone."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.pipe.close()


def _collect(ranks: list[Rank], deadline_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise PoolTimeout(_stacks(list(waiting.values())))
        for pipe in ready:
            rank = waiting.pop(pipe)
            outcome = _receive(rank)
            if outcome.error is not None:
                raise _death_among(ranks) or outcome.error
            values[rank.call.rank] = outcome.value
    # A rank that left early would close sockets that its peers still read, so all wait for this word.
    for rank in ranks:
        rank.pipe.send_bytes(b"leave")
        rank.process.join(timeout=10)
    return [values[rank] for rank in range(len(ranks))]


def _receive(rank: Rank) -> Outcome:
    try:
        return pickle.loads(rank.pipe.recv_bytes())
    except EOFError:
        rank.process.join()
        return Outcome(None, _death_of(rank))


def _death_of(rank: Rank) -> ChildProcessError:
    return ChildProcessError(f"rank {rank.call.rank} died with status {rank.process.exitcode}")


def _death_among(ranks: list[Rank]) -> ChildProcessError | None:
    """A rank whose peer has died only says that a connection broke, and may say it before that death is known."""
    if any(wait([rank.process.sentinel for rank in ranks], timeout=0.5)):
        return next((_death_of(rank) for rank in ranks if rank.process.exitcode), None)
    return None


def _stacks(ranks: list[Rank]) -> str:
    """Ask the ranks that still run for their stacks."""
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGUSR2)
    time.sleep(0.3)
    parts = [f"rank {r.call.rank} of {r.call.world}:\n{r.call.stack_file.read_text()}" for r in ranks]
    return f"no answer after {ranks[0].call.timeout_s} s from\n" + "\n".join(parts)


def _run_rank(pipe: Connection, pickled_call: bytes) -> None:
    """Body of a worker: join the group, run, answer, and stay until every rank has answered."""
    os.setsid()
    try:
        call: Call = pickle.loads(pickled_call)
        answer = pickle.dumps(Outcome(_run_in_group(call), None))
    except BaseException as error:
        answer = _failure(error)
    pipe.send_bytes(answer)
    pipe.recv_bytes()


def _run_in_group(call: Call) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(call.rank), "LOCAL_RANK": str(call.rank), "WORLD_SIZE": str(call.world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the ranks meet in a file
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a container's host name need not resolve
    with call.stack_file.open("w") as stack_file:
        faulthandler.register(signal.SIGUSR2, stack_file)
        store = dist.FileStore(str(call.scratch / "rendezvous"), call.world)
        timeout = timedelta(seconds=call.timeout_s)
        dist.init_process_group("gloo", store=store, rank=call.rank, world_size=call.world, timeout=timeout)
        # Some functions leave the group at once, or die, while another rank still connects.
        store.set(f"met_{call.rank}", "")
        store.wait([f"met_{rank}" for rank in range(call.world)])
        value = call.fn(call.rank, call.world, *call.args)
        faulthandler.unregister(signal.SIGUSR2)
    return value


def _failure(error: BaseException) -> bytes:
    text = f"on rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}:\n{traceback.format_exc()}"
    error.add_note(text)
    error.__cause__ = error.__context__ = None  # told by the note, and they may not pickle
    try:
        answer = pickle.dumps(Outcome(None, error))
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps(Outcome(None, RuntimeError(text)))
