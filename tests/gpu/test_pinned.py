"""Batches in page-locked memory arrive on the GPU as they were, by copies that do not wait."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields, replace

import pytest
import torch

from cogvit.batch import DataPosition, PackedImages, PackedText, StepBatch, move
from data_pipeline.pinned import pinned_ahead
from tests.packs import random_batch

STEPS = 4


def steps(*, embeds: bool) -> Generator[StepBatch]:
    """Steps of two packs; on a stage that does not embed, patches have no width."""
    for step in range(STEPS):
        packs = [random_batch(2 * step + number, {}) for number in range(2)]
        if not embeds:
            packs = [replace(one, images=replace(one.images, patches=one.images.patches[:, :0])) for one in packs]
        yield StepBatch(tuple(packs), DataPosition("plan", step + 1))


def tensors_of(packed: PackedImages | PackedText) -> list[torch.Tensor]:
    return [getattr(packed, field.name) for field in fields(packed)]


@pytest.mark.parametrize("embeds", [True, False])
def test_pinned_batches_arrive_as_they_were(device: torch.device, embeds: bool) -> None:
    here = torch.device("cuda", torch.cuda.current_device())
    pairs = zip(pinned_ahead(steps(embeds=embeds), here), steps(embeds=embeds), strict=True)
    for step, expected in pairs:
        assert step.position == expected.position
        for batch, wanted in zip(step.micro, expected.micro, strict=True):
            assert batch.text is not None and wanted.text is not None
            moved = move(batch, device)  # returns before the copies are done
            assert moved.text is not None
            for packed, arrived, same in (
                (batch.images, moved.images, wanted.images),
                (batch.text, moved.text, wanted.text),
            ):
                for tensor, copy, reference in zip(*map(tensors_of, (packed, arrived, same)), strict=True):
                    assert tensor.is_pinned() or not tensor.numel()
                    assert copy.is_cuda and torch.equal(copy.cpu(), reference)
