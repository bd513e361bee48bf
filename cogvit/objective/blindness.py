"""What images are worth to a language model: how much worse it says what follows when it is shown other ones.

A model that has stopped looking, or never began, goes on to lower its loss: that alone does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cogvit.batch import Batch
from cogvit.model.vit import grids_of
from cogvit.objective.language import Language
from cogvit.parallel.schedule import Schedule

EFFECT = "image_effect"


def with_other_images(batch: Batch, spatial_pool: int) -> Batch:
    """Return a pack in which every place of an image shows what follows half a pack of images later, round about.

    The turn is by whole images, so that where all have one size each place shows another image whole; a pack of one
    image shows it out of order. Where there is none, nothing changes.
    """
    sequence = batch.sequence
    assert sequence is not None, "a language model reads sequences"
    sizes = [-(-rows // spatial_pool) * -(-columns // spatial_pool) for rows, columns in grids_of(batch.images)]
    sizes = [size for size in sizes if size]
    total = sum(sizes)
    if not total:
        return batch
    turn = sum(sizes[: (len(sizes) + 1) // 2]) if len(sizes) > 1 else total // 2
    row_S = sequence.visual_row
    shown_S = ((row_S + turn) % total).where(row_S >= 0, row_S)
    return replace(batch, sequence=replace(sequence, visual_row=shown_S))


class Watched(Language):
    """The next-token objective, whose evaluation also says what images are worth.

    spatial_pool: sides of the groups of patches that are a token.
    """

    def __init__(self, spatial_pool: int) -> None:
        self.spatial_pool = spatial_pool

    def evaluate(self, model: Any, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss terms, and "image_effect": nats a label by which other images raise the loss."""
        terms = super().evaluate(model, micro, schedule)
        other = super().evaluate(model, [with_other_images(one, self.spatial_pool) for one in micro], schedule)
        return {**terms, EFFECT: other["loss"] - terms["loss"]}
