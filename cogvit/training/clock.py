"""The parts of a step, timed where they run."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class StepClock:
    """Marks points of a step: on CUDA among what the device has to do, so that nothing waits in order to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        """Note this point."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def spans_s(self) -> list[float]:
        """Return the seconds between the marks, each of which the device must have passed."""
        return [_between_s(first, second) for first, second in pairwise(self._marks)]


def _between_s(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event)
    return first.elapsed_time(second) / 1000.0
