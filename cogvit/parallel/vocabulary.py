"""The vocabulary split over the tensor ranks: embedding, head, and the cross entropy of labels.

Shape letters beyond the project's: V tokens of the vocabulary, R labels that count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.parallel.linear import mark_shard
from cogvit.parallel.mesh import Mesh

from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy  # isort: skip
from megatron.core.tensor_parallel.mappings import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

_CHUNK_LABELS = 1024  # whose logits exist at once: 0.6 GB of a vocabulary of 152K in fp32
_KEPT_BYTES = 1 << 26  # of a pack's logits that are kept for backward: making these again is not worth what it saves


class Vocabulary(nn.Module):
    """This tensor rank's rows of an embedding or of a head."""

    def __init__(self, vocab_size: int, dim: int, mesh: Mesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size // mesh.tp_size, dim, device=mesh.device))
        mark_shard(self.weight, dim=0)
        self.first = mesh.tp_rank * len(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embedded ids [..., D], whole on every tensor rank. An id outside the vocabulary gives zeros."""
        return embedded(ids, self.weight, self.first)


def embedded(ids: Tensor, weight_VD: Tensor, first: int) -> Tensor:
    """Return the embedded ids [..., D], whole on every tensor rank; weight_VD holds the ids from `first` on."""
    row = ids - first
    here = (row >= 0) & (row < len(weight_VD))
    x_D = F.embedding(row.clamp(0, len(weight_VD) - 1), weight_VD)
    return reduce_from_tensor_model_parallel_region(x_D.masked_fill(~here.unsqueeze(-1), 0.0))


def logits_of(hidden_D: Tensor, weight_VD: Tensor) -> Tensor:
    """Return this tensor rank's logits [..., V / tp] of hidden states that every tensor rank holds whole."""
    return F.linear(copy_to_tensor_model_parallel_region(hidden_D), weight_VD)


def label_loss(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    label_S: Tensor,
    weight_S: Tensor,
    count: int | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return the sum over labels of weight times cross entropy in nats, 0-dim fp32.

    Args:
        hidden_SD: what the head reads, whole on every tensor rank.
        weight_VD: this tensor rank's rows of the head.
        label_S: as in `loss_in_chunks`, with what follows.
        weight_S: of the labels.
        count: R, how many labels have a weight.
        recompute: make logits again in backward, however few they are.
    """
    keeps = not recompute and count is not None and 4 * count * len(weight_VD) <= _KEPT_BYTES
    return loss_in_chunks(partial(_chunk_loss, weight_VD), hidden_SD, label_S, weight_S, count, keeps=keeps)


def loss_in_chunks(
    chunk_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_SD: Tensor,
    label_S: Tensor,
    weight_S: Tensor,
    count: int | None,
    *,
    keeps: bool = False,
) -> Tensor:
    """Return the sum of chunk_loss(hidden, label, weight) over chunks of the labels that have a weight.

    Labels of weight 0 cost nothing. The logits of the others exist a chunk at a time and are made again in backward, so
    that their memory does not grow with the pack, unless they are kept.

    Args:
        chunk_loss: of some labels; of none too, where the head takes part with zeros.
        hidden_SD: what the head reads.
        label_S: what follows each token.
        weight_S: of the labels.
        count: R, how many labels have a weight; None waits for the device to know.
        keeps: keep the logits for backward, because they are few.
    """
    row_R = rows_with_weight(weight_S, count)
    chunks = zip(
        *(x.index_select(0, row_R).split(_CHUNK_LABELS) for x in (hidden_SD, label_S, weight_S.float())), strict=True
    )  # one empty chunk where no label counts
    if keeps:
        return torch.stack([chunk_loss(*chunk) for chunk in chunks]).sum()
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()


def label_logprobs(hidden_RD: Tensor, weight_VD: Tensor, label_R: Tensor) -> Tensor:
    """Return the log-probability of each label in nats, [R] fp32; arguments, chunks and memory as of `label_loss`."""
    chunks = zip(hidden_RD.split(_CHUNK_LABELS), label_R.split(_CHUNK_LABELS), strict=True)
    losses = [
        checkpoint(_chunk_losses, weight_VD, hidden, label, use_reentrant=False, preserve_rng_state=False)
        for hidden, label in chunks
    ]
    return -torch.cat(losses)


def rows_with_weight(weight_S: Tensor, count: int | None = None) -> Tensor:
    """Return the places [R] that have a weight; count is R, and None waits for the device to know."""
    return (weight_S.nonzero() if count is None else torch.nonzero_static(weight_S, size=count)).squeeze(1)


def _chunk_loss(weight_VD: Tensor, hidden_RD: Tensor, label_R: Tensor, weight_R: Tensor) -> Tensor:
    return (_chunk_losses(weight_VD, hidden_RD, label_R) * weight_R).sum()


def _chunk_losses(weight_VD: Tensor, hidden_RD: Tensor, label_R: Tensor) -> Tensor:
    logits_1RV = logits_of(hidden_RD, weight_VD).unsqueeze(0)
    if not len(label_R):
        return logits_1RV.float().sum(-1)[0]
    loss_1R: Tensor = vocab_parallel_cross_entropy(logits_1RV, label_R.unsqueeze(0))
    return loss_1R[0]
