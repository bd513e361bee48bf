"""The sigmoid loss over the pairs of all data-parallel ranks, with its gradients.

A rank compares its own images with everybody's texts, in two levels: neighbors gather their texts, and groups of them
stand in a ring and pass what they gathered around in both directions while the ranks compute. So a rank holds a few
groups' texts at a time, and the number of messages and blocks does not grow with the ranks. A group of one rank is a
ring of ranks; a group of all gathers everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cogvit.config import ContrastConfig
from cogvit.model.sigmoid import Logits, Side, Sums, add_pairs, agreements, block_edges, no_sums
from cogvit.parallel.mesh import Mesh

_WORTH = 1024  # texts of a block whose products take longer than its messages and the operations around them


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


@dataclass(frozen=True)
class Groups:
    """How the dp ranks stand in the ring: so many neighbors gather their texts and pass them on together."""

    ranks: int  # of every group
    inside: dist.ProcessGroup | None  # this rank's own; None where it is alone in it


def start_groups(config: ContrastConfig, pairs: int, mesh: Mesh) -> Groups:
    """Make the groups for a global batch of so many pairs; collective over all ranks."""
    ranks = group_ranks(config, pairs, mesh.dp_size)
    return Groups(ranks, None if ranks == 1 else mesh.new_dp_neighbors(ranks))


def group_ranks(config: ContrastConfig, pairs: int, dp_size: int) -> int:
    """Return how many ranks gather their texts: as few as make a block of texts that is worth a message.

    Each of the ring's groups costs the same few operations and messages, however few its texts are.
    """
    if config.loss == "gather":
        return dp_size
    fits = (ranks for ranks in range(1, dp_size) if dp_size % ranks == 0 and ranks * pairs >= _WORTH * dp_size)
    return config.group_ranks or next(fits, dp_size)


def sigmoid_gradients(
    image_nE: Tensor,
    text_nE: Tensor,
    pairs: Pairs,
    log_t: Tensor,
    bias: Tensor,
    mesh: Mesh,
    groups: Groups,
    config: ContrastConfig,
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
    own_text_nE = _rows(text_nE.detach(), here).to(dtype)
    limit = math.log(config.max_temperature)
    logits = Logits(log_t.detach().to(dtype).clamp(max=limit).exp(), bias.detach().to(dtype), config.chunk_pairs)
    num_pairs = max(sum(counts), 1)
    sums = no_sums(images)
    known = _known(counts, identity_nK, logits.chunk, groups, mesh)
    d_text = _compare(sums, images, own_text_nE, logits, known, groups, mesh).div_(num_pairs)
    d_log_t = sums.d_log_t(images, logits.chunk) / num_pairs
    del images, own_text_nE  # where some pairs are absent these are copies, and so is what `_in_slots` makes
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


@dataclass(frozen=True)
class _Texts:
    """What is known of a group's texts before they arrive."""

    counts: list[int]  # of each rank of the group
    identity_mK: Tensor
    agree: Sequence[Sequence[bool]]  # with this rank's images, block by block

    @property
    def total(self) -> int:
        return sum(self.counts)


def _known(counts: Sequence[int], own_nK: Tensor, chunk: int, groups: Groups, mesh: Mesh) -> list[_Texts]:
    """Gather everybody's identities and find, once, which blocks of the loss have equal captions."""
    everyone_mK = _gathered(own_nK, counts, None if mesh.dp_size == 1 else mesh.dp_group)
    by_group = [list(counts[first : first + groups.ranks]) for first in range(0, mesh.dp_size, groups.ranks)]
    ends = list(accumulate(map(sum, by_group), initial=0))
    blocks = [block_edges(sum(one), chunk)[:-1] for one in by_group]
    edges = [start + edge for start, own in zip(ends, blocks, strict=False) for edge in own]
    columns = iter(agreements(own_nK, everyone_mK, chunk, [*edges, ends[-1]]))
    return [
        _Texts(one, everyone_mK[start:end], list(islice(columns, len(own))))
        for one, own, (start, end) in zip(by_group, blocks, pairwise(ends), strict=True)
    ]


@dataclass(frozen=True)
class _Lane:
    """One direction of the ring: where texts go next, and over how many hops; both in groups."""

    step: int
    hops: int


def _compare(
    sums: Sums, images: Side, text_nE: Tensor, logits: Logits, known: Sequence[_Texts], groups: Groups, mesh: Mesh
) -> Tensor:
    """Compare with all texts as they pass; returns the gradient of this rank's texts.

    The texts of a group are gathered by its ranks and travel both ways around, half of the groups each; every rank
    passes them to its like in the next group, and the gradients follow one turn behind, collecting its and its likes'
    part. While a rank compares what it holds, the next texts and the gradients so far are under way; only the last
    message, a gradient's way home, is waited for. There the group adds up its ranks' parts.
    """
    number, place = divmod(mesh.dp_rank, groups.ranks)
    size, home = len(known), known[number]
    own = _gathered(text_nE, home.counts, groups.inside)
    d_own = torch.zeros_like(own)
    lanes = (_Lane(1, size // 2), _Lane(-1, (size - 1) // 2))
    held, part = [own] * 2, [own] * 2
    for turn in range(lanes[0].hops + 1):
        mail = _Mail(mesh, groups.ranks)
        arriving, behind = list(held), {}
        for which, lane in enumerate(lanes):
            if turn < lane.hops:
                source = known[(number - (turn + 1) * lane.step) % size]
                arriving[which] = mail.exchange(held[which], lane.step, source.total)
            if 1 < turn <= lane.hops:
                behind[which] = mail.exchange(part[which], lane.step, len(held[which]))
        mail.post()
        if turn == 0:
            first = sum(home.counts[:place])
            add_pairs(sums, images, Side(own, home.identity_mK), d_own, logits, home.agree, own=first)
        for which, lane in enumerate(lanes):
            if 0 < turn <= lane.hops:
                met = known[(number - turn * lane.step) % size]
                part[which] = torch.zeros_like(held[which])
                add_pairs(sums, images, Side(held[which], met.identity_mK), part[which], logits, met.agree, own=None)
        mail.wait()
        for which, passed in behind.items():
            part[which] += passed
        held = [arriving[which] if turn < lane.hops else own for which, lane in enumerate(lanes)]  # the others are done
    del own, held, arriving
    mail = _Mail(mesh, groups.ranks)
    back = [mail.exchange(part[n], -lane.step * lane.hops, len(d_own)) for n, lane in enumerate(lanes) if lane.hops]
    mail.post()
    mail.wait()
    for passed in back:
        d_own += passed
    del part, back
    return _scattered(d_own, home.counts, place, groups.inside)


class _Mail:
    """Messages between ranks of the ring that are sent and received together, in one order everywhere."""

    def __init__(self, mesh: Mesh, group_ranks: int) -> None:
        self._mesh, self._group_ranks = mesh, group_ranks
        self._messages: list[dist.P2POp] = []
        self._pending: list[dist.Work] = []

    def exchange(self, outgoing: Tensor, step: int, rows: int) -> Tensor:
        """Send rows `step` groups on; returns where as many steps behind the given number of rows will arrive."""
        group, rank, size = self._mesh.dp_group, self._mesh.dp_rank, self._mesh.dp_size
        hop = step * self._group_ranks
        incoming = outgoing.new_empty(rows, outgoing.shape[1])
        for operation, tensor, peer in ((dist.isend, outgoing, rank + hop), (dist.irecv, incoming, rank - hop)):
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
    if mesh.dp_size == 1:
        return own.tolist()
    counts = own.new_empty(mesh.dp_size)
    dist.all_gather_single(counts, own, group=mesh.dp_group)
    return counts.tolist()


def _gathered(own: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of all ranks of a group end to end; None: of this rank alone."""
    if group is None:
        return own
    most = max(counts)
    everyone = own.new_empty(len(counts) * most, own.shape[1])
    if everyone.numel():
        padded = own.contiguous() if len(own) == most else F.pad(own, (0, 0, 0, most - len(own)))
        dist.all_gather_single(everyone, padded, group=group)
    return everyone if min(counts) == most else everyone[_filled(counts, own.device)]


def _scattered(everyone: Tensor, counts: Sequence[int], place: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over a group's ranks of one rank's rows, given every rank's end to end: `_gathered`'s reverse."""
    if group is None:
        return everyone
    if everyone.device.type == "cpu":  # gloo would add up a copy of all, and keep a rank's rows of it
        dist.all_reduce(everyone, group=group)
        return everyone.split(list(counts))[place].clone()
    most = max(counts)
    own = everyone.new_empty(most, everyone.shape[1])
    if min(counts) != most:
        padded = everyone.new_zeros(len(counts) * most, everyone.shape[1])
        everyone = padded.index_copy_(0, _filled(counts, own.device), everyone)
    if everyone.numel():
        dist.reduce_scatter_single(own, everyone, group=group)
    return own[: counts[place]]


def _filled(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return which rows hold something when each rank's are followed by others up to the same number."""
    columns = torch.arange(max(counts))
    return (columns < torch.tensor(counts).unsqueeze(1)).flatten().nonzero().squeeze(1).to(device)
