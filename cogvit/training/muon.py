"""The update rules: SGD, AdamW and Muon in one optimizer that stays exact when its parameters are flat ZeRO partitions.

SGD and AdamW are elementwise, so a partition is updated like any tensor. Muon needs whole matrices: its momentum lives
on the partition, and only the matrices that meet the partition are put together, over dp where a border cuts them, then
over tp. Each rank keeps its slice of the result; a matrix that several ranks share is orthogonalized by each of them.
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

Item = TypeVar("Item")

MOMENTS: dict[Kind, tuple[str, ...]] = {
    "muon": ("momentum",),
    "sgd": ("momentum",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
_BUCKET_ELEMENTS = 25_000_000  # 100 MB: matrices that travel together


@dataclass(frozen=True)
class MatrixSpan:
    """Where one matrix, as this tp rank holds it, lies in the flat buffer of its group."""

    start: int
    shape: tuple[int, int]
    tp_dim: int | None = None  # dim that tp splits; None where every tp rank holds the whole matrix
    qkv_heads: int | None = None  # of this tp rank, where the rows are Megatron's [H, 3, K]; None for other matrices

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Partition:
    """The slice [start, start + size) of a group's flat buffer that one dp rank owns; all ranks have one size."""

    start: int
    size: int
    matrices: tuple[MatrixSpan, ...]  # of the whole group, in buffer order

    def overlap(self, span: MatrixSpan) -> slice:
        """The elements of a matrix in this partition, counted from its start; empty where there are none."""
        first, last = max(span.start, self.start), min(span.stop, self.start + self.size)
        return slice(first - self.start, max(first, last) - self.start)

    def is_cut(self, span: MatrixSpan) -> bool:
        """Whether a border between partitions runs through a matrix; the same answer on every dp rank."""
        return span.start // self.size != (span.stop - 1) // self.size


def _whole(matrix_RC: Tensor) -> Partition:
    """Describe a parameter that is one matrix and not partitioned."""
    rows, columns = matrix_RC.shape
    return Partition(0, matrix_RC.numel(), (MatrixSpan(0, (rows, columns)),))


@dataclass(frozen=True)
class Piece:
    """A matrix that meets this rank's partition, as this tp rank holds it."""

    span: MatrixSpan
    mine: slice  # of the partition: the elements of the matrix that this dp rank owns
    start: int  # of those, inside the matrix
    matrix_RC: Tensor


@dataclass(frozen=True)
class Gather:
    """Matrices on their way: each tp rank's shards end to end, complete when `work` is."""

    pieces: tuple[Piece, ...]
    shards_F: tuple[Tensor, ...]  # one flat tensor per tp rank
    work: dist.Work | None


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
        """Nesterov momentum, orthogonalized matrix by matrix; elements outside every matrix stay 0."""
        momentum.lerp_(grad, 1.0 - self._config.momentum)
        update = grad.lerp(momentum, self._config.momentum)
        partition = self._partitions.get(param) or _whole(param)
        direction_F = torch.zeros_like(update).reshape(-1)
        pieces = self._over_dp(update.reshape(-1), partition)
        for gather in _one_ahead(self._over_tp(pieces)):
            if gather.work is not None:
                gather.work.wait()
            offset = 0
            for piece in gather.pieces:
                size = piece.matrix_RC.numel()
                shards = [flat_F[offset : offset + size].view(piece.span.shape) for flat_F in gather.shards_F]
                offset += size
                shard_F = self._orthogonal_shard(piece.span, shards).reshape(-1)
                owned = piece.mine.stop - piece.mine.start
                direction_F[piece.mine] = shard_F[piece.start : piece.start + owned]
        return direction_F.view_as(param)

    def _over_dp(self, update_F: Tensor, partition: Partition) -> Iterator[Piece]:
        """Yield the matrices that meet this rank's partition, put together from the dp ranks that own pieces.

        A matrix inside one partition needs no communication. Those that a border cuts are summed from the pieces by all
        dp ranks, a bucket at a time and one after the other. With many more dp ranks than matrices nearly all are cut,
        which costs a second reduction of the gradients and the memory of the matrices that meet the partition.
        """
        cut = [span for span in partition.matrices if partition.is_cut(span)]
        for span in partition.matrices:
            mine = partition.overlap(span)
            if mine.start < mine.stop and not partition.is_cut(span):
                yield Piece(span, mine, 0, update_F[mine].view(span.shape))
        for bucket in _buckets(cut, [span.stop - span.start for span in cut]):
            wholes = [update_F.new_zeros(span.stop - span.start) for span in bucket]
            for span, whole_F in zip(bucket, wholes, strict=True):
                mine = partition.overlap(span)
                start = partition.start + mine.start - span.start
                whole_F[start : start + mine.stop - mine.start] = update_F[mine]
            flat_F = torch.cat(wholes)
            dist.all_reduce(flat_F, group=self._dp_group)
            for span, whole_F in zip(bucket, flat_F.split([len(whole) for whole in wholes]), strict=True):
                mine = partition.overlap(span)
                if mine.start < mine.stop:
                    yield Piece(span, mine, partition.start + mine.start - span.start, whole_F.view(span.shape))

    def _over_tp(self, pieces: Iterator[Piece]) -> Iterator[Gather]:
        """Start to gather the matrices that tp splits, a bucket at a time; the others are there already."""
        held = list(pieces)
        gathered = [piece for piece in held if self._gathers(piece.span)]
        for piece in held:
            if not self._gathers(piece.span):
                yield Gather((piece,), (piece.matrix_RC.reshape(-1),), None)
        for bucket in _buckets(gathered, [piece.matrix_RC.numel() for piece in gathered]):
            flat_F = torch.cat([piece.matrix_RC.reshape(-1) for piece in bucket])
            shards = [torch.empty_like(flat_F) for _ in range(dist.get_world_size(self._tp_group))]
            work = dist.all_gather(shards, flat_F, group=self._tp_group, async_op=True)
            yield Gather(tuple(bucket), tuple(shards), work)

    def _keeps_heads(self, span: MatrixSpan) -> bool:
        """Whether each head's part is orthogonal by itself: heads are whole on their tensor rank."""
        return span.qkv_heads is not None and self._config.muon_qkv == "heads"

    def _gathers(self, span: MatrixSpan) -> bool:
        """Whether the tensor ranks put the whole matrix together."""
        return span.tp_dim is not None and self._config.muon_tp == "gather" and not self._keeps_heads(span)

    def _orthogonal_shard(self, span: MatrixSpan, shards: list[Tensor]) -> Tensor:
        """Return this tp rank's part of the orthogonalized matrix, given all parts or its own alone."""
        if len(shards) > 1:
            assert span.tp_dim is not None
            whole = replace(span, qkv_heads=None if span.qkv_heads is None else span.qkv_heads * len(shards))
            orthogonal = self._orthogonalize(whole, torch.cat(shards, dim=span.tp_dim), None)
            return orthogonal.chunk(len(shards), dim=span.tp_dim)[dist.get_rank(self._tp_group)]
        if span.tp_dim is None or self._config.muon_tp == "gather" or self._keeps_heads(span):
            return self._orthogonalize(span, shards[0], None)
        assert self._tp_group is not None
        return self._orthogonalize(span, shards[0], Shards(self._tp_group, span.tp_dim))

    def _orthogonalize(self, span: MatrixSpan, matrix_RC: Tensor, shards: Shards | None) -> Tensor:
        kind = self._config.muon_qkv
        heads = span.qkv_heads
        parts_BRC = matrix_RC.unsqueeze(0) if heads is None else parts_of_qkv(matrix_RC, heads, kind)
        self.newton_schulz_calls += len(parts_BRC)
        rows, columns = parts_BRC.shape[1:]
        if shards is not None:
            split = dist.get_world_size(shards.group)
            rows, columns = (rows * split, columns) if shards.dim == 0 else (rows, columns * split)
        parts_BRC = newton_schulz(parts_BRC, shards) * rms_matched_scale(rows, columns)
        return parts_BRC[0] if heads is None else qkv_of_parts(parts_BRC, heads, kind)


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
