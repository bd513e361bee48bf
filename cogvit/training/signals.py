"""Leaving on request: signals become a flag that all ranks read as one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

REQUEUE_STATUS = 75
# SIGUSR1 comes from Slurm before the time limit, SIGTERM at it or on preemption, SIGINT from a terminal, SIGHUP from
# one that is closed.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# One request reaches a rank more than once: the terminal or Slurm signals every process, and torchrun passes it on.
_SAME_REQUEST_S = 2.0
_NO_MORE = b"\0"  # the number of no signal


class StopRequest:
    """Whether somebody asked this run to stop; listens while the context is open.

    The first signal asks for a checkpoint and an orderly end. A further one, later than the echoes of the first, ends
    the process at once with exit status 75. A thread waits for it: the main one may be inside a collective whose peer
    does not come, and Python runs handlers only between two operations of the main thread. Enter it after ray.init,
    which sets a SIGTERM handler of its own.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._arrivals, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=_end_at_the_second, args=(self._arrivals,), daemon=True)
        self._thread.start()
        self._previous_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        # nohup has SIGHUP ignored, and that stays so.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wake)
        os.write(self._wake, _NO_MORE)
        self._thread.join()
        os.close(self._arrivals)
        os.close(self._wake)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked."""
        return self._asked

    def agreed(self, all_reduce_max: Callable[[int], int]) -> bool:
        """Return the same answer on every rank: whether any of them was asked. Collective."""
        return all_reduce_max(int(self.requested)) > 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True


def _end_at_the_second(arrivals: int) -> None:
    """Read the numbers of signals as they arrive; body of the thread."""
    first_s: float | None = None
    while (numbers := os.read(arrivals, 64)) and _NO_MORE not in numbers:
        now_s = time.monotonic()
        if not any(number in SIGNALS for number in numbers):
            continue
        if first_s is None:
            first_s = now_s
        elif now_s - first_s > _SAME_REQUEST_S:
            os._exit(REQUEUE_STATUS)
