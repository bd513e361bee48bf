"""What the engine asks of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from cogvit.batch import Batch
from cogvit.parallel.schedule import Schedule


class Objective(Protocol):
    """What a stage trains: it runs the model's towers on the microbatches and leaves gradients behind."""

    def train(self, model: Any, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the global loss terms; "loss" is the one that is minimized."""
        ...

    def evaluate(self, model: Any, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the global loss terms without gradients."""
        ...
