"""Ends a hanging rank: when a step takes too long, every thread's stack goes to a file and the process exits.

All ranks of a hang wait for each other, so each of them gets here and leaves its stacks; the launch script then sees
a failed job and requeues it.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from types import TracebackType
from typing import Self


class Watchdog:
    """Armed by the first `feed`, so that start-up and the first step may take as long as they need.

    A step, each batch of an evaluation and each wait between them have the whole timeout.
    """

    def __init__(self, stacks: Path, timeout_s: float) -> None:
        self.timeout_s = timeout_s  # 0: never
        self._path = stacks

    def __enter__(self) -> Self:
        self._file = self._path.open("a")  # a requeued run must not wipe the stacks of the hang before it
        return self

    def feed(self) -> None:
        """Say that the run is alive; the next call is due within the timeout."""
        if self.timeout_s > 0:
            faulthandler.dump_traceback_later(self.timeout_s, file=self._file, exit=True)

    def rest(self) -> None:
        """Wait without a limit until the next `feed`."""
        faulthandler.cancel_dump_traceback_later()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
