"""What the threads that write a checkpoint have to say to each other: a few words through the store, no messages.

The store is the one that the ranks met at, so a world of thousands needs no sockets between its ranks for this, and
what training sends never meets it. That a rank is gone its neighbors notice, who say so there.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from cogvit.errors import CheckpointError
from cogvit.training.neighbors import Neighbors

Result = TypeVar("Result")
_LOOK_EVERY_S = 0.5  # thousands of ranks ask one store
_GONE = "gone"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """Where a rank's bytes go, and who writes before it: the ranks of a node one after the other into one file."""

    file: int
    begins: bool  # the file
    ends: bool
    after: int | None  # the rank that writes before
    followed: bool  # by one that waits


def turn_of(rank: int, hosts: list[str], at_a_time: int = 64, *, shared: bool = True) -> Turn:
    """Return a rank's turn, so that at most so many ranks write at a time. hosts: of each rank.

    shared: whether ranks of a host write into one file, as they can on a disk; else each has its own.
    """
    nodes: dict[str, list[int]] = {}
    for one, host in enumerate(hosts):
        nodes.setdefault(host, []).append(one)
    number, own = next(pair for pair in enumerate(nodes.values()) if rank in pair[1])
    place, queue = own.index(rank), list(nodes.values())
    before = own[place - 1] if place else queue[number - at_a_time][-1] if number >= at_a_time else None
    followed = place + 1 < len(own) or number + at_a_time < len(queue)
    if not shared:
        return Turn(rank, True, True, before, followed)
    return Turn(number, place == 0, place + 1 == len(own), before, followed)


class Together:
    """The ranks of the world, for work that all do and one concludes; a rank's calls come from one thread."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._number = 0
        self._given_up = Event()
        self._store: Any = None
        self._neighbors: Neighbors | None = None
        if world_size == 1:
            return
        store: Any = _get_default_store()
        start = store.add(f"checkpoints/starts/{rank}", 1)  # of as many in this world
        self._store = dist.PrefixStore(f"checkpoints/{start}", store.clone())  # type: ignore[attr-defined]
        self._neighbors = Neighbors(rank, world_size, self._store)
        if self._neighbors.fault:
            _log.warning("%s; one that ends while a checkpoint is written is noticed late", self._neighbors.fault)

    def give_up(self) -> None:
        """Let whoever waits stop waiting: this rank leaves in the middle, and others may have."""
        self._given_up.set()

    def close(self) -> None:
        """Leave: nobody waits for this rank any more, or who does learns that it is gone."""
        if self._neighbors is not None:
            self._neighbors.close()

    def in_turn(self, turn: Turn, work: Callable[[], Result]) -> Result:
        """Do something, inside `run`, when the rank before has. Errors: CheckpointError where that one failed."""
        if turn.after is not None and (fault := self._take(self._key(f"turn/{turn.after}"))):
            raise CheckpointError(fault)
        result, fault = _attempt(work)
        if turn.followed:
            self._store.set(self._key(f"turn/{self._rank}"), pickle.dumps(fault))
        if fault:
            raise CheckpointError(fault)
        return result

    def run(self, work: Callable[[], Result], conclude: Callable[[list[Result]], None]) -> None:
        """Do something on every rank, then conclude on the writer, which is given every rank's result.

        Returns when it is concluded. Errors: CheckpointError on every rank if either fails on any.
        """
        mine, fault = _attempt(work)
        if self._store is None:
            verdict = fault or _attempt(lambda: conclude([mine]))[1]
        elif self._rank:
            self._store.set(self._key(self._rank), pickle.dumps((mine, fault)))
            verdict = self._read(self._key("verdict"))
        else:
            answers = [(mine, fault), *(self._take(self._key(rank)) for rank in range(1, self._world_size))]
            faults = [fault for _, fault in answers if fault]
            verdict = faults[0] if faults else _attempt(lambda: conclude([result for result, _ in answers]))[1]
            self._store.set(self._key("verdict"), pickle.dumps(verdict))
            self._store.delete_key(f"{self._number - 1}/verdict")  # all have read it: they answered since
        self._number += 1
        if verdict:
            raise CheckpointError(verdict)

    def _key(self, who: int | str) -> str:
        return f"{self._number}/{who}"

    def _take(self, key: str) -> Any:
        value = self._read(key)
        self._store.delete_key(key)
        return value

    def _read(self, key: str) -> Any:
        assert self._neighbors is not None, "one who waits is not alone"
        pause_s, gone = 0.005, None
        try:
            while not self._store.check([key]):
                if self._given_up.is_set():
                    raise CheckpointError("the run ended before it was complete")
                if gone is not None:  # and had not done its part: that was looked at again
                    self._store.set(_GONE, str(gone))
                if self._store.check([_GONE]):
                    raise CheckpointError(f"rank {self._store.get(_GONE).decode()} is gone")
                gone = self._neighbors.wait(pause_s)
                pause_s = min(1.5 * pause_s, _LOOK_EVERY_S)
            return pickle.loads(self._store.get(key))
        except RuntimeError as error:  # what the store says of a connection that is gone
            raise CheckpointError(f"the first rank does not answer ({str(error).splitlines()[0]})") from None


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return work(), ""
    except Exception as error:  # of any kind: the others wait to be told; torch.save wraps what the disk says
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        return None, str(cause) or type(cause).__name__
