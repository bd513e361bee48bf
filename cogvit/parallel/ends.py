"""Messages across a pipeline: what the first stage has that the last one needs, or all need, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.parallel.mesh import Mesh


def to_first_stage(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Mesh) -> list[Tensor]:
    """Bring fp32 tensors of the last stage to the first.

    Args:
        tensors: on the last stage; anything elsewhere.
        shapes: of the tensors, known on both ends.
        mesh: with at least two stages.

    Returns the tensors on the first stage, an empty list elsewhere. Each tensor rank brings what its own peer gets.
    """
    return _carried(tensors, shapes, mesh, source=mesh.pp_size - 1, target=0)


def to_last_stage(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Mesh) -> list[Tensor]:
    """Bring fp32 tensors of the first stage to the last; the counterpart of `to_first_stage`."""
    return _carried(tensors, shapes, mesh, source=0, target=mesh.pp_size - 1)


def to_all_stages(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Mesh) -> list[Tensor]:
    """Return fp32 tensors of the first stage, on every stage.

    Args:
        tensors: on the first stage; anything elsewhere.
        shapes: of the tensors, known on all stages.
        mesh: with at least two stages.
    """
    first = dist.get_process_group_ranks(mesh.pp_group)[0]
    given = [x.detach().float().contiguous() for x in tensors] if mesh.is_first_stage else []
    everywhere = given or [torch.empty(shape, device=mesh.device) for shape in shapes]
    for tensor in everywhere:
        if tensor.numel():
            dist.broadcast(tensor, first, group=mesh.pp_group)
    return everywhere


def summed_on_first_stage(tensors: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """Return the sums over the stages of fp32 tensors, on the first; an empty list elsewhere. It overwrites them."""
    first = dist.get_process_group_ranks(mesh.pp_group)[0]
    for tensor in tensors:
        if tensor.numel():
            dist.reduce(tensor, first, group=mesh.pp_group)
    return list(tensors) if mesh.is_first_stage else []


def _carried(
    tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Mesh, *, source: int, target: int
) -> list[Tensor]:
    ranks = dist.get_process_group_ranks(mesh.pp_group)
    if mesh.pp_rank == source:
        for tensor in tensors:
            if tensor.numel():
                dist.send(tensor.detach().float().contiguous(), ranks[target], group=mesh.pp_group)
    if mesh.pp_rank != target:
        return []
    received = [torch.empty(shape, device=mesh.device) for shape in shapes]
    for tensor in received:
        if tensor.numel():
            dist.recv(tensor, ranks[source], group=mesh.pp_group)
    return received
