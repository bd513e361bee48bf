"""The log of loss spikes: steps whose loss stands out of the recent ones, with what helps to explain them."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from statistics import median

_WINDOW_STEPS = 64
_FEWEST_STEPS = 8  # before them there is no recent past to compare with
_LEAST_RISE = 0.1  # of a loss that is nearly 0 any noise is a multiple


class SpikeLog:
    """Appends a line to logs/spikes.jsonl for each loss well above `factor` times the median of the last 64."""

    def __init__(self, path: Path, factor: float) -> None:
        self._path, self._factor = path, factor
        self._recent: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def record(self, step: int, values: dict[str, float]) -> str | None:
        """Take one step's metrics; returns a line for people where it was a spike."""
        loss, usual = values["loss"], median(self._recent) if self._recent else 0.0
        enough = len(self._recent) >= _FEWEST_STEPS and usual > 0
        self._recent.append(loss)
        if not (self._factor > 0 and enough and loss > max(self._factor * usual, usual + _LEAST_RISE)):
            return None
        row = {"step": step, "loss": loss, "median": usual}
        row |= {name: value for name, value in values.items() if name.startswith(("grad_norm", "loss_", "lr"))}
        told = f"step {step}: loss {loss:.4g} is {loss / usual:.1f} times the recent median"
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk does not end a run
            return f"{told}; {self._path} cannot be written ({error.strerror}): {json.dumps(row)}"
        return f"{told}; see {self._path}"
