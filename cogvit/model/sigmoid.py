"""The sigmoid loss of image-text pairs and its gradients, one small block of logits at a time.

Loss and gradients come out of one walk over the blocks and no block outlives its turn, so memory grows with the number
of pairs, not with its square, and nothing is kept for a backward pass.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
Shapes: n images, m texts, E shared space, K kinds of identity, r rows and c columns of a block.
"""

from __future__ import annotations

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


def add_pairs(sums: Sums, images: Side, texts: Side, d_text_mE: Tensor, logits: Logits, *, paired: bool) -> None:
    """Add every image-text pair of two sides to the sums, and to the texts' gradients, in place.

    paired: image i belongs to text i; otherwise all pairs are negatives.
    """
    size = logits.chunk
    overlaps = _overlaps(images.identity_nK, texts.identity_nK, size)
    text_blocks = zip(texts.embed_nE.split(size), texts.identity_nK.split(size), d_text_mE.split(size), strict=True)
    for column, (text_cE, text_id_cK, d_text_cE) in enumerate(text_blocks):
        scaled_cE = logits.temperature * text_cE
        d_scaled_cE = torch.zeros_like(d_text_cE)
        image_blocks = zip(
            images.embed_nE.split(size), images.identity_nK.split(size), sums.d_image_nE.split(size), strict=True
        )
        for row, (image_rE, image_id_rK, d_image_rE) in enumerate(image_blocks):
            logit_rc = torch.addmm(logits.bias, image_rE, scaled_cE.T)
            same_rc = _same(image_id_rK, text_id_cK) if overlaps[row][column] else None
            loss, d_logit_rc = _block(logit_rc, same_rc, paired=paired and row == column)
            sums.loss.add_(loss)
            sums.d_bias.add_(d_logit_rc.sum())
            d_image_rE.addmm_(d_logit_rc, scaled_cE)
            d_scaled_cE.addmm_(d_logit_rc.T, image_rE)
        d_text_cE.addcmul_(d_scaled_cE, logits.temperature)


def _block(logit_rc: Tensor, same_rc: Tensor | None, *, paired: bool) -> tuple[Tensor, Tensor]:
    """Return a block's summed loss and the gradient of its logits, which it overwrites."""
    positive_r = logit_rc.diagonal().clone() if paired else logit_rc.new_zeros(0)
    if same_rc is not None:
        logit_rc.masked_fill_(same_rc, -torch.inf)  # no loss and no gradient
    loss_rc = F.softplus(logit_rc, threshold=_LINEAR_ABOVE)
    d_logit_rc = logit_rc.sigmoid_()
    if paired:
        loss_rc.diagonal().copy_(F.softplus(-positive_r, threshold=_LINEAR_ABOVE))
        d_logit_rc.diagonal().copy_(-torch.sigmoid(-positive_r))
    return loss_rc.sum(), d_logit_rc


def _overlaps(image_id_nK: Tensor, text_id_mK: Tensor, size: int) -> list[list[bool]]:
    """Say in which blocks an image and a text agree in one of the K identities: in few, and that is cheap to see.

    On CUDA in all of them, unseen: to look would be to wait for the device.
    """
    images, texts = image_id_nK.split(size), text_id_mK.split(size)
    if image_id_nK.is_cuda or not image_id_nK.shape[1]:
        return [[bool(image_id_nK.shape[1])] * len(texts)] * len(images)
    agree = [
        torch.isin(image_id_r, text_id_c).any()
        for image_id_rK in images
        for text_id_cK in texts
        for image_id_r, text_id_c in zip(image_id_rK.unbind(1), text_id_cK.unbind(1), strict=True)
    ]
    found: list[list[bool]] = torch.stack(agree).view(len(images), len(texts), -1).any(2).tolist()
    return found


def _same(image_id_rK: Tensor, text_id_cK: Tensor) -> Tensor:
    """Say which pairs agree in one of the K identities, [r, c]."""
    same_rc = image_id_rK[:, None, 0] == text_id_cK[:, 0]
    for image_id_r, text_id_c in zip(image_id_rK.unbind(1)[1:], text_id_cK.unbind(1)[1:], strict=True):
        same_rc |= image_id_r.unsqueeze(1) == text_id_c
    return same_rc
