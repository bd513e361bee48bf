"""Batches that a thread prepares ahead; that they end in page-locked memory is for tests/gpu."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace

import pytest

from cogvit.batch import DataPosition, StepBatch
from cogvit.errors import DataError
from data_pipeline.pinned import prepared_ahead
from tests.packs import random_batch


def steps(taken: list[int], last: int) -> Generator[StepBatch]:
    """Steps 1 to last, then an error; notes what was taken, and 0 when it is closed."""
    try:
        for step in range(1, last + 1):
            taken.append(step)
            yield StepBatch((random_batch(step, {}),), DataPosition("plan", step))
        raise DataError("shard 7 vanished")
    finally:
        taken.append(0)


def counted(batch: StepBatch) -> StepBatch:
    return replace(batch, decoded=10 * batch.position.step)


def test_batches_come_prepared_in_order_and_an_error_in_its_place() -> None:
    batches = prepared_ahead(steps([], 3), counted)
    for step in (1, 2, 3):
        batch = next(batches)
        assert (batch.position.step, batch.decoded) == (step, 10 * step)
    with pytest.raises(DataError, match="shard 7 vanished"):
        next(batches)


def test_an_end_is_an_end() -> None:
    source = (StepBatch((), DataPosition("plan", step)) for step in (1, 2))
    assert [batch.position.step for batch in prepared_ahead(source, counted)] == [1, 2]


def test_one_batch_is_prepared_ahead_and_closing_ends_everything() -> None:
    taken: list[int] = []
    batches = prepared_ahead(steps(taken, 9), counted)
    next(batches)
    next(batches)
    batches.close()
    assert taken == [1, 2, 3, 0]
    assert not any(thread.name.startswith("prepare") for thread in threading.enumerate())
