"""What the threads that write a checkpoint have to say to each other: a few words through the store, no messages.

The store is the one that the ranks met at, so a world of thousands needs no sockets between its ranks for this, and
what training sends never meets it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from threading import Event
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import _get_default_store

from cogvit.errors import CheckpointError

Result = TypeVar("Result")
_LOOK_EVERY_S = 0.5  # thousands of ranks ask one store


class Together:
    """The ranks of the world, for work that all do and one concludes; a rank's calls come from one thread."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        store: Any = _get_default_store()
        self._store = store.clone() if world_size > 1 else None  # a connection of its own
        self._number = 0
        self._given_up = Event()

    def give_up(self) -> None:
        """Let whoever waits stop waiting: this rank leaves in the middle, and others may have."""
        self._given_up.set()

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
            self._store.delete_key(f"checkpoint/{self._number - 1}/verdict")  # all have read it: they answered since
        self._number += 1
        if verdict:
            raise CheckpointError(verdict)

    def _key(self, who: int | str) -> str:
        return f"checkpoint/{self._number}/{who}"

    def _take(self, key: str) -> Any:
        value = self._read(key)
        assert self._store is not None
        self._store.delete_key(key)
        return value

    def _read(self, key: str) -> Any:
        assert self._store is not None
        pause_s = 0.005
        try:
            while not self._store.check([key]):
                if self._given_up.wait(pause_s):
                    raise CheckpointError("the run ended before it was complete")
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
