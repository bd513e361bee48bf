"""Packed tokens on their way through a tower: what the blocks need to know of them, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cogvit.model.attention import Segments


class _Permute(torch.autograd.Function):
    """Reorder rows by a permutation; the gradient is a gather by its inverse, not a scatter."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return x[order] for a permutation and its inverse, both [len(x)] int64."""
    permuted: Tensor = _Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


@dataclass(frozen=True)
class TokenOrder:
    """How a tower lays out a pack: segments of equal length side by side, so that they share a batch of attention.

    Attributes:
        segments: of the tower's tokens.
        source_S: int64, the row of the pack that each token is: one of T tokens, then one of N CLS tokens; None where
            all tokens lie as in the pack.
        place_S: int64, the inverse of source_S.
    """

    segments: Segments
    source_S: Tensor | None
    place_S: Tensor | None

    def arrange(self, x: Tensor) -> Tensor:
        """Take rows [S, ...] from the pack's order to the tower's."""
        return x if self.source_S is None or self.place_S is None else permute_rows(x, self.source_S, self.place_S)

    def restore(self, x: Tensor) -> Tensor:
        """Take rows [S, ...] from the tower's order to the pack's."""
        return x if self.source_S is None or self.place_S is None else permute_rows(x, self.place_S, self.source_S)


def token_order(segments: Segments, *, cls: bool) -> TokenOrder:
    """Return the order of a pack's tokens, each image behind its CLS token if there is one.

    CLS tokens of absent images lie behind the padding. Images stay as they lie where sorting makes no larger batches,
    and on CUDA, where attention takes them as they are and the order is made without the host.
    """
    if segments.cu_seqlens.is_cuda:
        return order_behind_cls(segments) if cls else TokenOrder(segments, None, None)
    lengths, bounds = segments.lengths[:-1], [0, *accumulate(segments.lengths)]
    num_tokens, slots = bounds[-1], list(range(len(lengths)))
    if len({*lengths} - {0}) < len(segments.runs):
        slots.sort(key=lengths.__getitem__)
    elif not cls:
        return TokenOrder(segments, None, None)
    rows: list[int] = []
    for slot in slots:
        patches = range(bounds[slot], bounds[slot + 1])
        rows += [num_tokens + slot, *patches] if cls and patches else patches
    rows += range(bounds[-2], num_tokens)
    rows += [num_tokens + slot for slot in slots if cls and not lengths[slot]]
    ordered = [lengths[slot] + (1 if cls and lengths[slot] else 0) for slot in slots]
    ends = [*accumulate(ordered, initial=0), len(rows)]
    source_S, device = torch.tensor(rows), segments.cu_seqlens.device
    return TokenOrder(
        Segments(torch.tensor(ends, dtype=torch.int32).to(device), (*ordered, ends[-1] - ends[-2]), len(slots)),
        source_S.to(device),
        source_S.argsort().to(device),
    )


def order_behind_cls(segments: Segments) -> TokenOrder:
    """Return the order that puts each image's CLS token before its patches, computed on the segments' device."""
    bounds, num_slots, num_tokens = segments.cu_seqlens.long(), segments.num_valid, sum(segments.lengths)
    # How many CLS tokens lie before each slot, and before the padding.
    ahead = F.pad((bounds.diff()[:-1] > 0).cumsum(0), (1, 0))
    index_T = torch.arange(num_tokens, device=bounds.device)
    slot_T = torch.searchsorted(bounds[1:-1].contiguous(), index_T, right=True)
    patch_T = index_T + torch.cat([ahead[1:], ahead[-1:]])[slot_T]
    index_N = torch.arange(num_slots, device=bounds.device)
    absent_N = num_tokens + ahead[-1] + index_N - ahead[:-1]
    cls_N = torch.where(bounds.diff()[:-1] > 0, bounds[:-2] + ahead[:-1], absent_N)
    place_S = torch.cat([patch_T, cls_N])
    source_S = torch.empty_like(place_S).scatter_(0, place_S, torch.arange(len(place_S), device=bounds.device))
    ends = torch.cat([bounds[:-1] + ahead, bounds[-1:] + num_slots])
    lengths = [length + 1 if length else 0 for length in segments.lengths[:-1]]
    padding = num_tokens + num_slots - sum(lengths)
    return TokenOrder(Segments(ends.to(torch.int32), (*lengths, padding), num_slots), source_S, place_S)


@dataclass(frozen=True)
class PackedLayout:
    """What every block needs beside the hidden states of S tokens.

    It has no parameters, so every pipeline stage can make its own.
    """

    order: TokenOrder
    cos_SK: Tensor | None  # rotary positions; None where positions are learned
    sin_SK: Tensor | None
    slot_S: Tensor  # int64, slot of each token; N for padding
    key_N: Tensor  # int64, seed of each slot's stochastic depth

    @property
    def segments(self) -> Segments:
        """Where each image or caption lies among the S tokens."""
        return self.order.segments


@dataclass(frozen=True)
class PackedTokens(PackedLayout):
    """A layout with the embedded tokens."""

    x_SD: Tensor


@dataclass(frozen=True)
class PackedFeatures:
    """Features of a pack, in the pack's own order.

    Attributes:
        patch_TD: of each patch; rows of padding carry no meaning.
        cls_ND: of each image slot, None where the encoder has no CLS token; rows of absent images carry no meaning.
    """

    patch_TD: Tensor
    cls_ND: Tensor | None


def pool_mean(x_TD: Tensor, slot_T: Tensor, num_slots: int) -> Tensor:
    """Return the mean over each slot's tokens in fp32, [num_slots, D]; zeros where a slot has none.

    Args:
        x_TD: tokens.
        slot_T: int64 slot of each token; num_slots for padding, which is left out.
        num_slots: N.
    """
    x_TD = x_TD.float()
    sum_ND = x_TD.new_zeros(num_slots + 1, x_TD.shape[1]).index_add(0, slot_T, x_TD)[:-1]
    count_N = x_TD.new_zeros(num_slots + 1).index_add(0, slot_T, torch.ones_like(x_TD[:, 0]))[:-1]
    return sum_ND / count_N.clamp(min=1).unsqueeze(1)
