"""The sigmoid loss of image-text pairs and its gradients, one small block of logits at a time.

Loss and gradients come out of one walk over the blocks and no block outlives its turn, so memory grows with the number
of pairs, not with its square, and nothing is kept for a backward pass.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
Shapes: n images, m texts, E shared space, K kinds of identity, r rows and c columns of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's softplus returns its argument above a threshold; at 20, its default, that shows in the 11th digit.
_LINEAR_ABOVE = 40.0


@dataclass(frozen=True)
class Side:
    """The images or the texts of some pairs."""

    embed_nE: Tensor  # unit vectors, fp32 or fp64
    identity_nK: Tensor  # int64; an image and a text that agree in one of the K are not negatives of each other


@dataclass(frozen=True)
class Logits:
    """How similarities become logits, and how many of them exist at a time."""

    temperature: Tensor  # one element
    bias: Tensor  # one element
    chunk: int  # rows and columns of the largest block


@dataclass(frozen=True)
class Sums:
    """Sums over the pairs met so far; `add_pairs` adds to them in place. Gradients are those of the summed loss."""

    loss: Tensor  # 0-dim fp64
    d_bias: Tensor  # 0-dim fp64
    d_image_nE: Tensor

    def d_log_t(self, images: Side, chunk: int) -> Tensor:
        """Return the gradient of the logarithm of the temperature, 0-dim fp64.

        Every logit is an image's product with something, plus the bias, so it follows from the images' gradients.
        """
        blocks = zip(images.embed_nE.split(chunk), self.d_image_nE.split(chunk), strict=True)
        return sum(((x * d).sum().double() for x, d in blocks), torch.zeros_like(self.loss))


def no_sums(images: Side) -> Sums:
    """Return the sums over no pairs at all."""
    zero = torch.zeros((), dtype=torch.float64, device=images.embed_nE.device)
    return Sums(zero, zero.clone(), torch.zeros_like(images.embed_nE))


def block_edges(count: int, chunk: int) -> list[int]:
    """Return where the blocks of a side begin, and its end; a side without pairs is one empty block."""
    return [*range(0, max(count, 1), chunk), count]


def agreements(
    image_id_nK: Tensor, text_id_mK: Tensor, chunk: int, column_edges: Sequence[int]
) -> tuple[tuple[bool, ...], ...]:
    """Say of each block whether an image and a text in it agree in one of the K identities: [column][row].

    Nearly no block has such a pair, and only those that do pay for looking at every pair. column_edges: `block_edges`
    of the texts, or those of several sides end to end. On CUDA it is said of all, unseen: to look would be to wait.
    """
    row_blocks, num_columns = image_id_nK.split(chunk), len(column_edges) - 1
    if image_id_nK.is_cuda or not image_id_nK.numel() or not text_id_mK.numel():
        return ((image_id_nK.numel() > 0,) * len(row_blocks),) * num_columns
    edges = torch.tensor(column_edges)
    found = []
    for image_id_rK in row_blocks:
        agrees_m = torch.zeros_like(text_id_mK[:, 0], dtype=torch.bool)
        for image_id_r, text_id_m in zip(image_id_rK.unbind(1), text_id_mK.unbind(1), strict=True):
            known_r = image_id_r.sort().values
            nearest_m = torch.searchsorted(known_r, text_id_m.contiguous()).clamp_(max=len(known_r) - 1)
            agrees_m |= known_r[nearest_m] == text_id_m
        found.append(F.pad(agrees_m.cumsum(0), (1, 0))[edges].diff() > 0)
    return tuple(map(tuple, torch.stack(found, dim=1).tolist()))


def add_pairs(
    sums: Sums,
    images: Side,
    texts: Side,
    d_text_mE: Tensor,
    logits: Logits,
    agree: Sequence[Sequence[bool]],
    *,
    own: int | None,
) -> None:
    """Add every image-text pair of two sides to the sums, and to the texts' gradients, in place.

    agree: what `agreements` says of these blocks. own: the text of the first image, whose followers are those of the
    others; None where all pairs are negatives. Never waits for the device.
    """
    size = logits.chunk
    text_blocks = zip(
        texts.embed_nE.split(size), texts.identity_nK.split(size), d_text_mE.split(size), agree, strict=True
    )
    for column, (text_cE, text_id_cK, d_text_cE, agree_rows) in enumerate(text_blocks):
        scaled_cE = logits.temperature * text_cE
        d_scaled_cE = torch.zeros_like(d_text_cE)
        image_blocks = zip(
            images.embed_nE.split(size),
            images.identity_nK.split(size),
            sums.d_image_nE.split(size),
            agree_rows,
            strict=True,
        )
        for row, (image_rE, image_id_rK, d_image_rE, agrees) in enumerate(image_blocks):
            logit_rc = torch.addmm(logits.bias, image_rE, scaled_cE.T)
            same_rc = _same(image_id_rK, text_id_cK) if agrees else None
            loss, d_logit_rc = _block(logit_rc, same_rc, _diagonal(own, row * size, column * size, logit_rc.shape))
            sums.loss.add_(loss)
            sums.d_bias.add_(d_logit_rc.sum())
            d_image_rE.addmm_(d_logit_rc, scaled_cE)
            d_scaled_cE.addmm_(d_logit_rc.T, image_rE)
            del logit_rc, d_logit_rc, same_rc  # the next block takes their place
        d_text_cE.addcmul_(d_scaled_cE, logits.temperature)


def _block(logit_rc: Tensor, same_rc: Tensor | None, own: int | None) -> tuple[Tensor, Tensor]:
    """Return a block's summed loss and the gradient of its logits, which it overwrites; `own`: the paired diagonal."""
    positive_r = logit_rc.new_zeros(0) if own is None else logit_rc.diagonal(own).clone()
    if same_rc is not None:
        logit_rc.masked_fill_(same_rc, -torch.inf)  # no loss and no gradient
    loss_rc = F.softplus(logit_rc, threshold=_LINEAR_ABOVE)
    d_logit_rc = logit_rc.sigmoid_()
    if own is not None:
        loss_rc.diagonal(own).copy_(F.softplus(-positive_r, threshold=_LINEAR_ABOVE))
        d_logit_rc.diagonal(own).copy_(-torch.sigmoid(-positive_r))
    return loss_rc.sum(), d_logit_rc


def _diagonal(own: int | None, first_row: int, first_column: int, shape: torch.Size) -> int | None:
    """Return which diagonal of a block holds images with their own texts; None where none does."""
    if own is None or not -shape[0] < own + first_row - first_column < shape[1]:
        return None
    return own + first_row - first_column


def _same(image_id_rK: Tensor, text_id_cK: Tensor) -> Tensor:
    """Say which pairs agree in one of the K identities."""
    same_rc = image_id_rK[:, :1] == text_id_cK[:, 0]
    for image_id_r, text_id_c in zip(image_id_rK.unbind(1)[1:], text_id_cK.unbind(1)[1:], strict=True):
        same_rc |= image_id_r.unsqueeze(1) == text_id_c
    return same_rc
