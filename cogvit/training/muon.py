"""The update rules: SGD, AdamW and Muon in one optimizer that stays exact when its parameters are flat ZeRO partitions.

SGD and AdamW are elementwise, so a partition is updated like any tensor. Muon needs whole matrices: its momentum lives
on the partition, and only the matrices that meet the partition are put together, over dp where a border cuts them, then
over tp. Each rank keeps its slice of the result; a matrix that several ranks share is orthogonalized by each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.config import OptimConfig
from cogvit.training.optim import Kind, ParamGroup

MOMENTS: dict[Kind, tuple[str, ...]] = {
    "muon": ("momentum",),
    "sgd": ("momentum",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
NEWTON_SCHULZ_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS_OF_ADAMW = 0.2


@dataclass(frozen=True)
class MatrixSpan:
    """Where one matrix, as this tp rank holds it, lies in the flat buffer of its group."""

    start: int
    shape: tuple[int, int]
    tp_dim: int | None  # dim that tp splits; None where every tp rank holds the whole matrix

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


def _whole(matrix_RC: Tensor) -> Partition:
    """Describe a parameter that is one matrix and not partitioned."""
    rows, columns = matrix_RC.shape
    return Partition(0, matrix_RC.numel(), (MatrixSpan(0, (rows, columns), None),))


def newton_schulz(matrix_RC: Tensor) -> Tensor:
    """Return the matrix with its singular values moved close to 1 (0.7 to 1.2), singular vectors kept.

    fp32, bf16 on CUDA. The result follows a permutation of rows or columns, so Megatron's interleaved q, k, v rows and
    the per-rank [gate; up] order of SwiGLU give what the plain order gives. Fused q, k, v count as one matrix.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    rows, columns = matrix_RC.shape
    x = matrix_RC.to(torch.bfloat16) if matrix_RC.is_cuda else matrix_RC
    x = x.mT if rows > columns else x
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if rows > columns else x).to(matrix_RC.dtype)


def rms_matched_scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonalized matrix the RMS of a typical AdamW update.

    With it lr and adamw_lr mean steps of the same size and one weight decay serves both; the first Muon's
    sqrt(max(1, rows / columns)) would need its own, larger rate. Source: Liu et al. 2025, arXiv:2502.16982, 2.2.
    """
    return _RMS_OF_ADAMW * max(rows, columns) ** 0.5


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

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's rate to this fraction of its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the gradients; DeepSpeed calls it once per group."""
        for group in self.param_groups:
            group["updates"] += 1
            for param in group["params"]:
                if param.grad is None:
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
        update_F, direction_F = update.reshape(-1), torch.zeros_like(update).reshape(-1)
        for span in partition.matrices:
            first, last = max(span.start, partition.start), min(span.stop, partition.start + partition.size)
            mine = slice(first - partition.start, max(first, last) - partition.start)
            matrix = self._matrix_over_dp(update_F[mine], span, first, partition.size)
            if matrix is not None:
                orthogonal = self._orthogonalize_over_tp(matrix, span.tp_dim)
                direction_F[mine] = orthogonal.reshape(-1)[first - span.start : last - span.start]
        return direction_F.view_as(param)

    def _matrix_over_dp(self, piece_F: Tensor, span: MatrixSpan, first: int, partition_size: int) -> Tensor | None:
        """Put a matrix together from the dp ranks that own pieces; None where this rank owns none.

        A matrix inside one partition needs no communication. One that a border cuts is summed from the pieces by all dp
        ranks, one matrix at a time, so that the exchange never takes more memory than a matrix.
        """
        if span.start // partition_size != (span.stop - 1) // partition_size:
            matrix_F = piece_F.new_zeros(span.stop - span.start)
            matrix_F[first - span.start :][: piece_F.numel()] = piece_F
            dist.all_reduce(matrix_F, group=self._dp_group)
        else:
            matrix_F = piece_F
        return matrix_F.view(span.shape) if piece_F.numel() else None

    def _orthogonalize_over_tp(self, matrix_RC: Tensor, tp_dim: int | None) -> Tensor:
        """Orthogonalize the whole matrix, whichever part of it this tp rank holds, and return that part."""
        if tp_dim is None:
            return self._orthogonalize(matrix_RC)
        tp_size, tp_rank = dist.get_world_size(self._tp_group), dist.get_rank(self._tp_group)
        shards = [torch.empty_like(matrix_RC) for _ in range(tp_size)]
        dist.all_gather(shards, matrix_RC.contiguous(), group=self._tp_group)
        return self._orthogonalize(torch.cat(shards, dim=tp_dim)).chunk(tp_size, dim=tp_dim)[tp_rank]

    def _orthogonalize(self, matrix_RC: Tensor) -> Tensor:
        self.newton_schulz_calls += 1
        return newton_schulz(matrix_RC) * rms_matched_scale(*matrix_RC.shape)
