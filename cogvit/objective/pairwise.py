"""The sigmoid loss over the pairs of all data-parallel ranks, with its gradients.

A rank compares its own images with everybody's texts. `gather` brings all texts to all ranks; `ring` passes them
around in both directions while the ranks compute, so that a rank holds the texts of a few neighbors at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cogvit.config import ContrastConfig
from cogvit.model.sigmoid import Logits, Side, Sums, add_pairs, no_sums
from cogvit.parallel.mesh import Mesh


@dataclass(frozen=True)
class Pairs:
    """What the loss needs to know of this rank's pairs beside their embeddings."""

    caption_id: Tensor  # [n] int64
    concept_id: Tensor  # [n] int64
    weight: Tensor  # [n] float32, 0 where the pair is absent

    def identity(self, leave_out: Literal["concepts", "captions", "none"]) -> Tensor:
        """Return [n, K] int64: pairs that agree in one of the K are not negatives of each other."""
        if leave_out == "none":
            return self.caption_id.new_empty(len(self.caption_id), 0)
        kinds = [self.caption_id, self.concept_id] if leave_out == "concepts" else [self.caption_id]
        return torch.stack(kinds, dim=1)


@dataclass(frozen=True)
class SigmoidGradients:
    """This rank's share of the loss, and the global loss's gradient with respect to what this rank brought."""

    loss: Tensor  # 0-dim, summed over dp it is the global loss
    image: Tensor  # [n, E], 0 where a pair is absent
    text: Tensor  # [n, E], likewise
    log_t: Tensor  # [1], this rank's share
    bias: Tensor  # [1], this rank's share


def sigmoid_gradients(
    image_nE: Tensor, text_nE: Tensor, pairs: Pairs, log_t: Tensor, bias: Tensor, mesh: Mesh, config: ContrastConfig
) -> SigmoidGradients:
    """Return the exact loss and gradients over the global batch, in fp32 (fp64 for fp64 embeddings).

    Every dp rank brings any number of pairs. The loss is divided by the number of all pairs that are there; which of
    them are no negatives of each other, `config.leave_out` says. Collective over the dp ranks.
    """
    dtype = torch.promote_types(image_nE.dtype, torch.float32)
    counts = _counts(pairs.weight, mesh)
    here = torch.nonzero_static(pairs.weight, size=counts[mesh.dp_rank]).squeeze(1)
    identity_nK = pairs.identity(config.leave_out)[here]
    images = Side(_rows(image_nE.detach(), here).to(dtype), identity_nK)
    texts = Side(_rows(text_nE.detach(), here).to(dtype), identity_nK)
    limit = math.log(config.max_temperature)
    logits = Logits(log_t.detach().to(dtype).clamp(max=limit).exp(), bias.detach().to(dtype), config.chunk_pairs)
    num_pairs = max(sum(counts), 1)
    sums = no_sums(images)
    compare = _ring if config.loss == "ring" else _gather
    d_text = compare(sums, images, texts, logits, counts, mesh).div_(num_pairs)
    d_log_t = sums.d_log_t(images, logits.chunk) / num_pairs
    del images, texts  # where some pairs are absent these are copies, and so is what `_in_slots` makes
    return SigmoidGradients(
        loss=(sums.loss / num_pairs).to(dtype),
        image=_in_slots(sums.d_image_nE.div_(num_pairs), here, len(image_nE)),
        text=_in_slots(d_text, here, len(text_nE)),
        log_t=_held(d_log_t, log_t.detach() >= limit, mesh).to(dtype),
        bias=(sums.d_bias / num_pairs).to(dtype).reshape(1),
    )


def _rows(x_nE: Tensor, here: Tensor) -> Tensor:
    """Return some rows; all of them without a copy."""
    return x_nE if len(here) == len(x_nE) else x_nE[here]


def _in_slots(rows_nE: Tensor, here: Tensor, num_slots: int) -> Tensor:
    """Put rows back where they were taken, zeros elsewhere."""
    if len(rows_nE) == num_slots:
        return rows_nE
    return rows_nE.new_zeros(num_slots, rows_nE.shape[1]).index_copy_(0, here, rows_nE)


def _held(d_log_t: Tensor, at_limit: Tensor, mesh: Mesh) -> Tensor:
    """Drop the gradient that would push a temperature at its limit further up."""
    total = d_log_t.clone()
    if mesh.dp_size > 1:
        dist.all_reduce(total, group=mesh.dp_group)
    return torch.where(at_limit & (total < 0.0), 0.0, d_log_t)


def _gather(sums: Sums, images: Side, texts: Side, logits: Logits, counts: Sequence[int], mesh: Mesh) -> Tensor:
    """Compare with all texts, gathered; returns the gradient of this rank's texts."""
    d_padded = images.embed_nE.new_zeros(mesh.dp_size, max(counts), texts.embed_nE.shape[1])
    all_texts = zip(_gathered(texts.embed_nE, counts, mesh), _gathered(texts.identity_nK, counts, mesh), strict=True)
    for rank, (text_mE, identity_mK) in enumerate(all_texts):
        block = Side(text_mE, identity_mK)
        add_pairs(sums, images, block, d_padded[rank, : counts[rank]], logits, paired=rank == mesh.dp_rank)
    if mesh.dp_size > 1:
        dist.all_reduce(d_padded, group=mesh.dp_group)
    return d_padded[mesh.dp_rank, : counts[mesh.dp_rank]]


@dataclass(frozen=True)
class _Lane:
    """One direction of the ring: where texts go next, and over how many hops."""

    step: int
    hops: int


def _ring(sums: Sums, images: Side, texts: Side, logits: Logits, counts: Sequence[int], mesh: Mesh) -> Tensor:
    """Compare with all texts as they pass; returns the gradient of this rank's texts.

    Texts travel both ways around, half of the ranks each, and their gradients follow one turn behind, collecting each
    rank's part. While a rank compares what it holds, the next texts and the gradients so far are under way; only the
    last message, a gradient's way home, is waited for.
    """
    rank, size = mesh.dp_rank, mesh.dp_size
    identities = _gathered(texts.identity_nK, counts, mesh)
    lanes = (_Lane(1, size // 2), _Lane(-1, (size - 1) // 2))
    held, part = [texts.embed_nE] * 2, [texts.embed_nE] * 2
    d_own = torch.zeros_like(texts.embed_nE)
    for turn in range(lanes[0].hops + 1):
        mail = _Mail(mesh)
        arriving, behind = list(held), {}
        for number, lane in enumerate(lanes):
            if turn < lane.hops:
                source = (rank - (turn + 1) * lane.step) % size
                arriving[number] = mail.exchange(held[number], lane.step, counts[source])
            if 1 < turn <= lane.hops:
                behind[number] = mail.exchange(part[number], lane.step, len(held[number]))
        mail.post()
        if turn == 0:
            add_pairs(sums, images, texts, d_own, logits, paired=True)
        for number, lane in enumerate(lanes):
            if 0 < turn <= lane.hops:
                block = Side(held[number], identities[(rank - turn * lane.step) % size])
                part[number] = torch.zeros_like(block.embed_nE)
                add_pairs(sums, images, block, part[number], logits, paired=False)
        mail.wait()
        for number, passed in behind.items():
            part[number] += passed
        held = arriving
    mail = _Mail(mesh)
    home = [mail.exchange(part[n], -lane.step * lane.hops, len(d_own)) for n, lane in enumerate(lanes) if lane.hops]
    mail.post()
    mail.wait()
    for passed in home:
        d_own += passed
    return d_own


class _Mail:
    """Messages between ranks of the ring that are sent and received together, in one order everywhere."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._messages: list[dist.P2POp] = []
        self._pending: list[dist.Work] = []

    def exchange(self, outgoing: Tensor, step: int, rows: int) -> Tensor:
        """Send rows `step` ranks on; returns where as many steps behind the given number of rows will arrive."""
        group, rank, size = self._mesh.dp_group, self._mesh.dp_rank, self._mesh.dp_size
        incoming = outgoing.new_empty(rows, outgoing.shape[1])
        for operation, tensor, peer in ((dist.isend, outgoing, rank + step), (dist.irecv, incoming, rank - step)):
            if len(tensor):
                self._messages.append(dist.P2POp(operation, tensor, group=group, group_peer=peer % size))
        return incoming

    def post(self) -> None:
        """Start all of them."""
        self._pending = dist.batch_isend_irecv(self._messages) if self._messages else []

    def wait(self) -> None:
        """Return when everything has been sent and has arrived."""
        for work in self._pending:
            work.wait()


def _counts(weight_n: Tensor, mesh: Mesh) -> list[int]:
    """Return how many pairs each dp rank brings; the one place where the loss waits for the device."""
    own = weight_n.count_nonzero().reshape(1)
    counts = own.new_zeros(mesh.dp_size)
    if mesh.dp_size > 1:
        dist.all_gather(list(counts.split(1)), own, group=mesh.dp_group)
    return (counts if mesh.dp_size > 1 else own).tolist()


def _gathered(local: Tensor, counts: Sequence[int], mesh: Mesh) -> list[Tensor]:
    """Return every dp rank's rows."""
    if mesh.dp_size == 1:
        return [local]
    if not max(counts) * local.shape[1]:
        return [local.new_empty(count, local.shape[1]) for count in counts]
    padded = F.pad(local, (0, 0, 0, max(counts) - len(local)))
    everyone = padded.new_empty(mesh.dp_size, *padded.shape)
    dist.all_gather(list(everyone.unbind()), padded, group=mesh.dp_group)
    return [rows[:count] for rows, count in zip(everyone, counts, strict=True)]
