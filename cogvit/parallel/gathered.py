"""The plain weights of a model that is split over ranks, put together on one of them, a tensor at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvit.parallel.convert import gather_plain, plain_tensors
from cogvit.parallel.mesh import Mesh


@torch.no_grad()
def trained_weights(module: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """Return what is trained of a model by its plain names, fp32 on the CPU: all on the writer, nothing elsewhere.

    Collective over the first replica, whose ranks alone take part; the others return at once. Memory: the writer's host
    holds the whole, its device one tensor more.
    """
    if mesh.dp_rank:
        return {}
    own = [tensor for tensor in plain_tensors(module) if tensor.parameter.requires_grad]
    shapes: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(mesh.pp_size)]
    described = [(tensor.name, tensor.plain_shape(mesh.tp_size)) for tensor in own]
    dist.all_gather_object(shapes, described, group=mesh.pp_group)
    whole = {}
    for tensor in own:
        plain = gather_plain(tensor, tensor.parameter.detach(), mesh.tp_group).float()
        if mesh.is_writer:
            whole[tensor.name] = plain.to("cpu", copy=True)
        elif mesh.tp_rank == 0:
            dist.send(plain.contiguous(), dist.get_global_rank(mesh.pp_group, 0), group=mesh.pp_group)
    if mesh.is_writer:
        for stage in range(1, mesh.pp_size):
            for name, shape in shapes[stage]:
                plain = torch.empty(shape, device=mesh.device)
                dist.recv(plain, dist.get_global_rank(mesh.pp_group, stage), group=mesh.pp_group)
                whole[name] = plain.cpu()
    return whole
