"""Copies of a rank's state for a checkpoint, which a thread writes while training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cogvit.training.zero import Fragment


class Snapshot:
    """Takes them one after the other; on CUDA into page-locked memory that is kept, so that the next one reuses it.

    Page-locking takes longer than the copy, and pageable memory makes the device wait for the host. On CPU memory is
    given back after each: there it is what the model lives in.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = torch.empty(0)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy fragments, all fp32; on CUDA what was taken before is overwritten."""
        views = list(fragments)
        ends = list(accumulate((view.values.numel() for view in views), initial=0))
        flat = self._room(ends[-1])
        copies = [flat[start:stop] for start, stop in pairwise(ends)]
        for view, copy in zip(views, copies, strict=True):
            copy.copy_(view.values.view(-1), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return [view._replace(values=copy) for view, copy in zip(views, copies, strict=True)]

    def _room(self, count: int) -> Tensor:
        if self._device.type != "cuda":
            return torch.empty(count)
        if len(self._held) != count:
            self._held = torch.empty(count, pin_memory=True)
        return self._held
