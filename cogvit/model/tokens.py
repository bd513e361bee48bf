"""Packed tokens on their way through a tower: what the blocks need to know of them, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cogvit.model.attention import Segments


@dataclass(frozen=True)
class PackedLayout:
    """What every block needs beside the hidden states of S tokens.

    It has no parameters, so every pipeline stage can make its own.
    """

    segments: Segments
    cos_SK: Tensor | None  # rotary positions; None where positions are learned
    sin_SK: Tensor | None
    slot_S: Tensor  # int64, slot of each token; N for padding
    key_N: Tensor  # int64, seed of each slot's stochastic depth


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
    count_N = slot_T.bincount(minlength=num_slots + 1)[:num_slots]
    return sum_ND / count_N.clamp(min=1).unsqueeze(1)
