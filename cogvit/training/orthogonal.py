"""Muon's matrix function: the nearest matrix with equal singular values, by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

NEWTON_SCHULZ_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS_OF_ADAMW = 0.2
_MODERATE_EXPONENT = 20  # where the 1e-7 below is small beside a norm


@dataclass(frozen=True)
class Shards:
    """How the ranks of a group share a matrix: each holds an equal part along `dim`."""

    group: dist.ProcessGroup
    dim: int


def newton_schulz(matrix_RC: Tensor, shards: Shards | None = None) -> Tensor:
    """Return the matrices [..., R, C] with singular values moved close to 1 (0.7 to 1.2), singular vectors kept.

    fp32, bf16 on CUDA. The result follows a permutation of rows or columns, so Megatron's interleaved q, k, v rows and
    the per-rank [gate; up] order of SwiGLU give what the plain order gives. With `shards` each rank brings its part of
    the matrix and gets its part of the result: products over the split dim are summed over the group.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    x = _in_range(matrix_RC, shards)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    transposed = x.shape[-2] > x.shape[-1] if shards is None else shards.dim == 0
    x = x.mT if transposed else x
    square = _summed(x.float().square().sum(dim=(-2, -1), keepdim=True), shards)
    x = x / (square.sqrt() + 1e-7).to(x.dtype)
    a, b, c = _QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = _summed(x @ x.mT, shards)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrix_RC.dtype)


def _in_range(matrix_RC: Tensor, shards: Shards | None) -> Tensor:
    """Return matrices whose norm fp32 can square, by a power of two: those as they are whose values are moderate.

    The result of the iterations does not change with it, and of 0 and of 1e-30 is what it is of 1.
    """
    largest = matrix_RC.abs().amax(dim=(-2, -1), keepdim=True)
    if shards is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=shards.group)
    exponent = torch.frexp(largest).exponent
    far = exponent.abs() > _MODERATE_EXPONENT
    # In two steps, each of which fp32 can express: 2 ** 140 is none of its numbers.
    half = torch.where(far, exponent, 0) // 2
    return torch.ldexp(torch.ldexp(matrix_RC, -half), half - torch.where(far, exponent, 0))


def _summed(partial: Tensor, shards: Shards | None) -> Tensor:
    if shards is not None:
        partial = partial.contiguous()
        dist.all_reduce(partial, group=shards.group)
    return partial


def rms_matched_scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonalized matrix the RMS of a typical AdamW update.

    With it lr and adamw_lr mean steps of the same size and one weight decay serves both; the first Muon's
    sqrt(max(1, rows / columns)) would need its own, larger rate. Source: Liu et al. 2025, arXiv:2502.16982, 2.2.
    """
    return _RMS_OF_ADAMW * max(rows, columns) ** 0.5


class QkvHeads(NamedTuple):
    """The heads of a fused q, k, v matrix, whose rows are Megatron's [G, H / G + 2, K]."""

    queries: int  # H
    keys: int  # G, and as many of values; H where each query has its own

    def times(self, count: int) -> QkvHeads:
        """Return the heads of so many such matrices."""
        return QkvHeads(self.queries * count, self.keys * count)


QkvKind = Literal["split", "heads", "fused"]


def parts_of_qkv(matrix_RC: Tensor, heads: QkvHeads, kind: QkvKind) -> list[Tensor]:
    """Return what is made orthogonal of a fused matrix, in batches of one shape.

    split: q, k and v, [3, H*K, C] where they are alike, else [1, H*K, C] and [2, G*K, C]; heads: [H + 2*G, K, C];
    fused: [1, R, C].
    """
    if kind == "fused":
        return [matrix_RC.unsqueeze(0)]
    if kind == "heads":
        return [rearrange(matrix_RC, "(n k) c -> n k c", n=heads.queries + 2 * heads.keys)]
    by_group = rearrange(matrix_RC, "(g n k) c -> g n k c", g=heads.keys, n=heads.queries // heads.keys + 2)
    if heads.queries == heads.keys:
        return [rearrange(by_group, "g qkv k c -> qkv (g k) c")]
    query, rest = by_group.split([by_group.shape[1] - 2, 2], dim=1)
    return [rearrange(query, "g n k c -> 1 (g n k) c"), rearrange(rest, "g kv k c -> kv (g k) c")]


def qkv_of_parts(parts: Sequence[Tensor], heads: QkvHeads, kind: QkvKind) -> Tensor:
    """Put the rows back where `parts_of_qkv` took them from."""
    if kind != "split":
        return parts[0].flatten(0, 1)
    if heads.queries == heads.keys:
        return rearrange(parts[0], "qkv (g k) c -> (g qkv k) c", g=heads.keys)
    sharing = heads.queries // heads.keys
    query = rearrange(parts[0], "1 (g n k) c -> g n k c", g=heads.keys, n=sharing)
    rest = rearrange(parts[1], "kv (g k) c -> g kv k c", g=heads.keys)
    return torch.cat([query, rest], dim=1).flatten(0, 2)
