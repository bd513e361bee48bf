"""Calls of code that is not ours: whatever it raises comes back as one line, and nobody waits for it forever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from cogvit.errors import DataError


class Hangs(DataError):
    """Foreign code did not return in time; its thread goes on, so the process that it is in should end."""


def patient(name: str, limit_s: float, call: Callable[..., Any], *arguments: object) -> Any:
    """Return what a call gives.

    Args:
        name: of what is called, for the errors.
        limit_s: how long it may take.
        call: what is called, in a thread of its own.
        arguments: its arguments.

    Errors: DataError when it raises, Hangs when it takes longer.
    """
    box: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            box.put((call(*arguments), None))
        except BaseException as error:  # also a task's exit, which is not ours
            box.put((None, error))

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        value, error = box.get(timeout=limit_s)
    except Empty:
        raise Hangs(f"{name} has not returned in {limit_s:g} s") from None
    if error is not None:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"{name} raised {said}") from error
    return value
