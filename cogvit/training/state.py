"""What a run knows of itself beside weights and moments: where it is and what it has seen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cogvit.batch import DataPosition
from cogvit.training.chrono import Chrono


@dataclass(frozen=True)
class TrainState:
    """The counters of a run after `step` optimizer steps; stored with every checkpoint."""

    step: int
    position: DataPosition
    images: int  # trained on so far, over all ranks
    tokens: int  # valid patch tokens so far, over all ranks
    chrono: Chrono = field(default_factory=Chrono)  # where the wall time went so far, over all starts
    skipped: int = 0  # steps whose gradients were not finite: they updated nothing
    best_step: int | None = None  # of the checkpoint with the lowest evaluation loss
    best_loss: float | None = None

    def after(
        self, position: DataPosition, *, images: int, tokens: int, spent: Chrono, skipped: bool = False
    ) -> TrainState:
        """Return the state one step later."""
        return replace(
            self,
            step=self.step + 1,
            position=position,
            images=self.images + images,
            tokens=self.tokens + tokens,
            chrono=self.chrono.plus(spent),
            skipped=self.skipped + skipped,
        )

    def spending(self, spent: Chrono) -> TrainState:
        """Return the state with time added."""
        return replace(self, chrono=self.chrono.plus(spent))

    def with_evaluation(self, loss: float) -> TrainState:
        """Return the state with this step marked as the best if its evaluation loss is the lowest so far."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return self
        return replace(self, best_step=self.step, best_loss=loss)


def state_to_json(state: TrainState) -> dict[str, Any]:
    """Return plain JSON values."""
    return asdict(state)


def state_from_json(values: dict[str, Any]) -> TrainState:
    """Return the state that `state_to_json` wrote."""
    parts = {"position": DataPosition(**values["position"]), "chrono": Chrono(**values["chrono"])}
    return TrainState(**{**values, **parts})
