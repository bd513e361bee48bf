"""What defines a sequence of global batches, besides the corpus and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cogvit.config import RunConfig
from cogvit.model.config import CogViTConfig, TextConfig
from data_pipeline.sizing import Sizing, sizing_of

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """Everything besides index and seed that defines the sequence of global batches."""

    mixture: tuple[tuple[str, float], ...]  # source, weight; all samples are one pool where it is empty
    global_batch_images: int
    canonical_shares: int
    lookahead_steps: int
    sizing: Sizing
    attention_tokens: int  # n0: the length at which attention costs as much as everything else
    batch_schedule: tuple[tuple[int, int], ...] = ()  # step, global_batch_images from it on
    budget_schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()  # step, sizing.budgets from it on

    @property
    def smallest_window_images(self) -> int:
        """Images that every look-ahead window has at least."""
        return self.lookahead_steps * min([self.global_batch_images, *(images for _, images in self.batch_schedule)])

    def batch_images(self, step: int) -> int:
        """Return the images of a step's global batch."""
        return _in_force(self.batch_schedule, step, self.global_batch_images)

    def images_before(self, window: int) -> int:
        """Return the images of all look-ahead windows before one."""
        end, total, images, since = window * self.lookahead_steps, 0, self.global_batch_images, 0
        for start, later in self.batch_schedule:
            if start >= end:
                break
            total, images, since = total + images * (start - since), later, start
        return total + images * (end - since)

    def sizing_at(self, step: int) -> Sizing:
        """Return how the images of a step are sized."""
        return replace(self.sizing, budgets=_in_force(self.budget_schedule, step, self.sizing.budgets))


def _in_force(schedule: Sequence[tuple[int, Value]], step: int, before: Value) -> Value:
    """Return the value of the last entry that has begun, or what holds before the first."""
    return next((value for start, value in reversed(schedule) if start <= step), before)


def attention_tokens(tower: CogViTConfig | TextConfig) -> int:
    """Return n0 of a tower: the length at which attention costs as much as everything else."""
    branches = 3 if tower.mlp == "swiglu" else 2
    # Per token and layer: 8 D^2 + 2 * branches * D * F of matrix products, 4 n D of attention.
    return 2 * tower.embed_dim + branches * tower.mlp_dim // 2


def plan_spec(config: RunConfig) -> PlanSpec:
    """Return the part of a configuration that the plan depends on."""
    data = config.data
    return PlanSpec(
        mixture=data.mixture,
        global_batch_images=data.global_batch_images,
        canonical_shares=data.canonical_shares,
        lookahead_steps=data.lookahead_steps,
        sizing=sizing_of(config),
        attention_tokens=attention_tokens(config.vision),
        batch_schedule=data.batch_schedule,
        budget_schedule=data.budget_schedule,
    )
