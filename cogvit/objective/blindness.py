"""What images are worth to a language model: how much worse it says what follows when it is shown other ones.

A model that has stopped looking, or never began, goes on to lower its loss: that alone does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cogvit.batch import Batch, SharpImages
from cogvit.objective.language import Language, image_tokens
from cogvit.parallel.schedule import Schedule

EFFECT = "image_effect"


def with_other_images(batch: Batch, spatial_pool: int, *, framed: bool = False) -> Batch:
    """Return a pack in which every place of an image shows what follows half a pack of images later, round about.

    The turn is by whole images, so that where all have one size each place shows another image whole; a pack of one
    image shows it out of order. Where there is none, nothing changes. A second encoder sees others likewise.
    """
    sequence = batch.sequence
    assert sequence is not None, "a language model reads sequences"
    sizes = [size for size in image_tokens(batch.images, spatial_pool, framed=framed) if size]
    total = sum(sizes)
    if not total:
        return batch
    turn = sum(sizes[: (len(sizes) + 1) // 2]) if len(sizes) > 1 else total // 2
    row_S = sequence.visual_row
    shown_S = ((row_S + turn) % total).where(row_S >= 0, row_S)
    return replace(batch, sequence=replace(sequence, visual_row=shown_S), sharp=_turned(batch.sharp))


def _turned(sharp: SharpImages | None) -> SharpImages | None:
    if sharp is None:
        return None
    images = sum(sharp.count)
    turn = sharp.patches_per_image * ((images + 1) // 2) if images > 1 else len(sharp.patches) // 2
    return replace(sharp, patches=sharp.patches.roll(-turn, 0))


class Watched(Language):
    """The next-token objective, whose evaluation also says what images are worth.

    spatial_pool: sides of the groups of patches that are a token.
    framed: whether learned tokens stand around each image.
    """

    def __init__(self, spatial_pool: int, *, framed: bool = False) -> None:
        self.spatial_pool, self.framed = spatial_pool, framed

    def evaluate(self, model: Any, micro: Sequence[Batch], schedule: Schedule) -> dict[str, Tensor]:
        """Return the loss terms, and "image_effect": nats a label by which other images raise the loss."""
        terms = super().evaluate(model, micro, schedule)
        others = [with_other_images(one, self.spatial_pool, framed=self.framed) for one in micro]
        other = super().evaluate(model, others, schedule)
        return {**terms, EFFECT: other["loss"] - terms["loss"]}
