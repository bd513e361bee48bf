"""A checkpoint read once by all ranks together: who has read a stretch of it hands it to those that need some of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cogvit.training.storage import PartReader, Stretch

if TYPE_CHECKING:  # weights are read without a trainer's libraries
    from cogvit.parallel.mesh import Mesh

_MESSAGE_BYTES = 1 << 26


def pass_on(reader: PartReader, dealt: Sequence[tuple[int, Stretch]], mesh: Mesh) -> None:
    """Bring every rank what its reader expects of the stretches that others hold. Collective over all ranks.

    dealt: who holds which, as `manifest.dealt`. On the layout that saved nobody lacks anything, and nothing is sent;
    else a stretch goes to all, 64 MiB at a time, and each keeps the tensors that it expects.
    """
    asked = torch.tensor([reader.lacks(stretch) for _, stretch in dealt], dtype=torch.int32, device=mesh.device)
    for (rank, stretch), is_asked in zip(dealt, mesh.all_reduce(asked, dist.ReduceOp.MAX).tolist(), strict=True):
        for start in range(stretch.start, stretch.stop, _MESSAGE_BYTES) if is_asked else ():
            content = torch.empty(min(_MESSAGE_BYTES, stretch.stop - start), dtype=torch.uint8, device=mesh.device)
            if rank == mesh.rank:
                content.copy_(torch.frombuffer(reader.held(stretch, start, len(content)), dtype=torch.uint8))
            dist.broadcast(content, src=rank)
            if rank != mesh.rank:
                reader.take(stretch.file, start, content.cpu().numpy().data)
