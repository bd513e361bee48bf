"""Leaving on request: signals become a flag that all ranks read as one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

REQUEUE_STATUS = 75
# SIGUSR1 comes from Slurm before the time limit, SIGTERM at it or on preemption, SIGINT from a terminal.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# One request reaches a rank more than once: the terminal or Slurm signals every process, and torchrun passes it on.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """Whether somebody asked this run to stop; listens while the context is open.

    The first signal asks for a checkpoint and an orderly end. A further one, later than the echoes of the first, ends
    the process at once with exit status 75. Enter it after ray.init, which sets a SIGTERM handler of its own.
    """

    def __init__(self) -> None:
        self._first_s: float | None = None  # on the monotonic clock
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked."""
        return self._first_s is not None

    def agreed(self, all_reduce_max: Callable[[int], int]) -> bool:
        """Return the same answer on every rank: whether any of them was asked. Collective."""
        return all_reduce_max(int(self.requested)) > 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        elif now_s - self._first_s > _SAME_REQUEST_S:
            os._exit(REQUEUE_STATUS)
