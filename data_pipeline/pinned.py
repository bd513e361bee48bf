"""Batches in page-locked host memory, from which a GPU copies while everything else goes on."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import torch

from cogvit.batch import StepBatch, pinned


def pinned_ahead(batches: Generator[StepBatch], device: torch.device) -> Generator[StepBatch]:
    """Yield the same batches in page-locked memory, for copies to a CUDA device; closes them with itself.

    The copy that pins is the only one between the decoder or the object store and the device.
    """
    return prepared_ahead(batches, partial(_pin_for, device))


def _pin_for(device: torch.device, batch: StepBatch) -> StepBatch:
    torch.cuda.set_device(device)  # of this thread, which would otherwise open a context on the first GPU
    return pinned(batch)


def prepared_ahead(batches: Generator[StepBatch], prepare: Callable[[StepBatch], StepBatch]) -> Generator[StepBatch]:
    """Yield prepared batches in their order, while a thread takes and prepares the one after; closes them with itself.

    Errors: those of the batches and of `prepare`, in the place of the batch.
    """

    def take() -> StepBatch | None:
        batch = next(batches, None)
        return None if batch is None else prepare(batch)

    # The thread ends first: a generator cannot be closed while it runs.
    with closing(batches), ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
        coming = thread.submit(take)
        while (batch := coming.result()) is not None:
            coming = thread.submit(take)
            yield batch
