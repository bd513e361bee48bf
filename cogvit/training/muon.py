"""The update rules: SGD, AdamW and Muon in one optimizer that stays exact when its parameters are flat ZeRO partitions.

SGD and AdamW are elementwise, so a partition is updated like any tensor. Muon needs whole matrices: its momentum lives
on the partition; each matrix is put together by one rank, over dp where a border between partitions cuts it, then over
tp, and orthogonalized there once, and every rank gets its slice of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.config import OptimConfig
from cogvit.training.optim import Kind, ParamGroup, lr_at
from cogvit.training.orthogonal import Shards, newton_schulz, parts_of_qkv, qkv_of_parts, rms_matched_scale
from cogvit.training.partition import Mail, MatrixSpan, Partition, exchange, from_owners, matrices_of, to_owners, whole

Item = TypeVar("Item")
Held = tuple[MatrixSpan, Tensor]  # a matrix, and this tp rank's part of it

MOMENTS: dict[Kind, tuple[str, ...]] = {
    "muon": ("momentum",),
    "sgd": ("momentum",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
_BUCKET_ELEMENTS = 25_000_000  # 100 MB: matrices that travel together


@dataclass(frozen=True)
class Deal:
    """Matrices on their way to the tp ranks that make them orthogonal."""

    bucket: tuple[Held, ...]  # with this rank's part of each
    owners: tuple[int, ...]  # tp rank that each is dealt to
    loads: tuple[int, ...]  # elements, per tp rank, of the parts that are dealt to it
    mail: Mail


class InnerOptimizer(torch.optim.Optimizer):
    """Updates each group by its kind: what DeepSpeed calls inside ZeRO, and alone the single-process reference.

    Weight decay is decoupled for every kind. DeepSpeed replaces a group's parameters by the flat partition this rank
    owns, which `bind_partitions` then describes; without that, parameters are whole. There is no "muon" in the class's
    name because DeepSpeed would run its own variant, which orthogonalizes before clipping.
    """

    def __init__(self, groups: Sequence[ParamGroup], config: OptimConfig) -> None:
        super().__init__(
            [
                {
                    "params": list(group.params),
                    "kind": group.kind,
                    "lr": group.peak_lr,
                    "peak_lr": group.peak_lr,
                    "weight_decay": group.weight_decay,
                    "updates": 0,
                }
                for group in groups
            ],
            defaults={},
        )
        self.newton_schulz_calls = 0
        self._config = config
        self._schedules = [group.schedule for group in groups]
        self._partitions: dict[Tensor, Partition] = {}
        self._dp_group: dist.ProcessGroup | None = None
        self._tp_group: dist.ProcessGroup | None = None

    def bind_partitions(
        self, partitions: Mapping[Tensor, Partition], dp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup
    ) -> None:
        """Take over flat partitions as parameters and create their state."""
        self._partitions = dict(partitions)
        self._dp_group, self._tp_group = dp_group, tp_group
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group["kind"])

    def set_lr_step(self, step: int) -> None:
        """Set every group's rate to that of the update with this index."""
        for group, schedule in zip(self.param_groups, self._schedules, strict=True):
            group["lr"] = group["peak_lr"] * lr_at(schedule, step)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the gradients; DeepSpeed calls it once per group."""
        for group in self.param_groups:
            group["updates"] += 1
            for param in group["params"]:
                if param.grad is None or group["peak_lr"] == 0.0:  # a locked module costs no Newton-Schulz
                    continue
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                state = self._state_of(param, group["kind"])
                if group["kind"] == "adamw":
                    self._adamw(param, param.grad, state, group)
                elif group["kind"] == "sgd":
                    state["momentum"].mul_(self._config.momentum).add_(param.grad)
                    param.add_(state["momentum"], alpha=-group["lr"])
                else:
                    param.add_(self._muon_direction(param, param.grad, state["momentum"]), alpha=-group["lr"])

    def _state_of(self, param: Tensor, kind: Kind) -> dict[str, Tensor]:
        state = self.state[param]
        for moment in MOMENTS[kind]:
            if moment not in state:
                state[moment] = torch.zeros_like(param, requires_grad=False)
        return state

    def _adamw(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self._config.beta1, self._config.beta2
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        correction1, correction2 = 1.0 - beta1 ** group["updates"], 1.0 - beta2 ** group["updates"]
        scale = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(self._config.eps)
        param.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / correction1)

    def _muon_direction(self, param: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
        """Nesterov momentum, orthogonalized matrix by matrix; elements outside every matrix stay 0.

        Cut matrices are on their way to their owners while the others are made orthogonal.
        """
        momentum.lerp_(grad, 1.0 - self._config.momentum)
        update_F = grad.lerp(momentum, self._config.momentum).reshape(-1)
        partition = self._partitions.get(param) or whole(param)
        direction_F = torch.zeros_like(update_F)
        mail = None if self._dp_group is None else to_owners(update_F, partition, self._dp_group)
        places = {span: partition.overlap(span, partition.rank) for span in partition.inside()}
        inside = [(span, update_F[place].view(span.shape)) for span, place in places.items()]
        for span, direction_RC in self._orthogonal(inside):
            direction_F[places[span]] = direction_RC.reshape(-1)
        if mail is not None:
            assert self._dp_group is not None
            results = list(self._orthogonal(matrices_of(mail, partition)))
            from_owners(results, direction_F, partition, self._dp_group)
        return direction_F.view_as(param)

    def _orthogonal(self, held: Sequence[Held]) -> Iterator[Held]:
        """Yield this tp rank's part of each matrix made orthogonal, given its parts: the same matrices on all tp ranks.

        Matrices that tp splits are dealt out over the tp ranks, which put theirs together, a bucket at a time.
        """
        here = [(span, shard_RC) for span, shard_RC in held if not self._gathers(span)]
        dealt = [(span, shard_RC) for span, shard_RC in held if self._gathers(span)]
        for span, shard_RC in here:
            yield span, self._orthogonal_shard(span, shard_RC)
        buckets = _buckets(dealt, [shard_RC.numel() for _, shard_RC in dealt])
        for deal in _one_ahead(self._dealt(bucket) for bucket in buckets):
            yield from self._returned(deal)

    def _dealt(self, bucket: Sequence[Held]) -> Deal:
        """Start to bring the parts of some matrices to the tp ranks that they are dealt to, by size."""
        assert self._tp_group is not None
        size, me = self._tp_group.size(), dist.get_rank(self._tp_group)
        loads, owners = [0] * size, []
        for _, shard_RC in bucket:
            owners.append(loads.index(min(loads)))
            loads[owners[-1]] += shard_RC.numel()
        to_rank = [
            [held[1] for held, owner in zip(bucket, owners, strict=True) if owner == rank] for rank in range(size)
        ]
        mail = exchange(to_rank, [loads[me]] * size, bucket[0][1], self._tp_group)
        return Deal(tuple(bucket), tuple(owners), tuple(loads), mail)

    def _returned(self, deal: Deal) -> Iterator[Held]:
        """Make this tp rank's matrices orthogonal and exchange the parts of all."""
        assert self._tp_group is not None
        size, me = self._tp_group.size(), dist.get_rank(self._tp_group)
        to_rank: list[list[Tensor]] = [[] for _ in range(size)]
        rests = deal.mail.arrived()
        for (span, shard_RC), owner in zip(deal.bucket, deal.owners, strict=True):
            if owner == me:
                shards = [rest[: shard_RC.numel()].view(span.shape) for rest in rests]
                rests = [rest[shard_RC.numel() :] for rest in rests]
                for parts, part_RC in zip(to_rank, self._orthogonal_whole(span, shards), strict=True):
                    parts.append(part_RC)
        rests = exchange(to_rank, deal.loads, deal.bucket[0][1], self._tp_group).arrived()
        for (span, shard_RC), owner in zip(deal.bucket, deal.owners, strict=True):
            yield span, rests[owner][: shard_RC.numel()].view(span.shape)
            rests[owner] = rests[owner][shard_RC.numel() :]

    def _keeps_heads(self, span: MatrixSpan) -> bool:
        """Whether each head's part is orthogonal by itself: heads are whole on their tensor rank."""
        return span.qkv_heads is not None and self._config.muon_qkv == "heads"

    def _gathers(self, span: MatrixSpan) -> bool:
        """Whether the tensor ranks put the whole matrix together."""
        return span.tp_dim is not None and self._config.muon_tp == "gather" and not self._keeps_heads(span)

    def _orthogonal_whole(self, span: MatrixSpan, shards: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return all tp ranks' parts of a matrix made orthogonal, given all its parts."""
        assert span.tp_dim is not None
        heads = None if span.qkv_heads is None else span.qkv_heads.times(len(shards))
        matrix_RC = torch.cat(list(shards), dim=span.tp_dim)
        return self._orthogonalize(replace(span, qkv_heads=heads), matrix_RC, None).chunk(len(shards), dim=span.tp_dim)

    def _orthogonal_shard(self, span: MatrixSpan, shard_RC: Tensor) -> Tensor:
        """Return this tp rank's part of a matrix made orthogonal, given that part: alone, or with the others'."""
        if span.tp_dim is None or self._keeps_heads(span):
            return self._orthogonalize(span, shard_RC, None)
        assert self._tp_group is not None
        return self._orthogonalize(span, shard_RC, Shards(self._tp_group, span.tp_dim))

    def _orthogonalize(self, span: MatrixSpan, matrix_RC: Tensor, shards: Shards | None) -> Tensor:
        kind = self._config.muon_qkv
        heads = span.qkv_heads
        parts = [matrix_RC.unsqueeze(0)] if heads is None else parts_of_qkv(matrix_RC, heads, kind)
        self.newton_schulz_calls += sum(map(len, parts))
        parts = [newton_schulz(part_BRC, shards) * _scale_of(part_BRC, shards) for part_BRC in parts]
        return parts[0][0] if heads is None else qkv_of_parts(parts, heads, kind)


def _scale_of(part_BRC: Tensor, shards: Shards | None) -> float:
    rows, columns = part_BRC.shape[1:]
    if shards is None:
        return rms_matched_scale(rows, columns)
    split = dist.get_world_size(shards.group)
    return rms_matched_scale(*((rows * split, columns) if shards.dim == 0 else (rows, columns * split)))


def _buckets(items: Sequence[Item], sizes: Sequence[int]) -> Iterator[list[Item]]:
    """Group neighbors up to _BUCKET_ELEMENTS; an item that is larger is alone."""
    bucket: list[Item] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if bucket and held + size > _BUCKET_ELEMENTS:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size
    if bucket:
        yield bucket


def _one_ahead(started: Iterator[Item]) -> Iterator[Item]:
    """Yield each item after the one behind it was started, so that it travels while this one is computed."""
    held = next(started, None)
    while held is not None:
        following = next(started, None)
        yield held
        held = following
