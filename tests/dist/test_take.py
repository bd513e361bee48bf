"""Taking a batch: ranks that balanced apart leave with equally many packs, and a failure of one is that of all."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cogvit.batch import DataPosition, StepBatch
from cogvit.config import ParallelConfig
from cogvit.errors import DataError
from cogvit.parallel.mesh import start_mesh, stop_mesh
from cogvit.training.loop import take
from tests.packs import random_batch
from tests.pool import Pool

TEACHER_DIMS = {"siglip2": 24, "dinov3": 16}


def uneven_batches(rank: int, fails: bool) -> Iterator[StepBatch]:
    """Rank r brings r + 1 packs, then possibly fails."""
    packs = tuple(random_batch(seed, TEACHER_DIMS) for seed in range(rank + 1))
    yield StepBatch(packs, DataPosition("plan", 1))
    if fails:
        raise DataError("shard 7 vanished")
    yield StepBatch(packs, DataPosition("plan", 2))


def take_two(rank: int, world: int) -> tuple[StepBatch, str]:
    mesh = start_mesh(ParallelConfig())
    try:
        source = uneven_batches(rank, fails=rank == 0)
        first = take(source, mesh)
        try:
            take(source, mesh)
        except DataError as error:
            return first, str(error)
        return first, ""
    finally:
        stop_mesh(mesh)


def test_every_rank_gets_as_many_packs_as_the_fullest_and_every_failure(pool: Pool) -> None:
    answers = pool.run(take_two, world=2)
    assert [message for _, message in answers] == ["shard 7 vanished"] * 2
    assert [len(step.micro) for step, _ in answers] == [2, 2]
    padding = answers[0][0].micro[1]
    assert padding.images.weight.sum() == 0 and padding.samples == (None,) * padding.images.num_slots
    assert (padding.images.segment() == padding.images.num_slots).all()
    assert padding.text is not None and padding.text.cu_seqlens.tolist()[-2:] == [0, len(padding.text.ids)]
    assert padding.targets is not None
    assert {name: tuple(x.shape) for name, x in padding.targets.features.items()} == {
        "siglip2": (0, 24),
        "dinov3": (0, 16),
    }
    kept = answers[0][0].micro[0].images
    assert torch.equal(kept.patches, random_batch(0, TEACHER_DIMS).images.patches)
