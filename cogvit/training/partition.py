"""Where matrices lie in a flat buffer whose slices the dp ranks own, and how cut ones come to one owner and back.

A border between two slices may run through a matrix. Its pieces then go to one of the ranks that hold some of it, and
the result's pieces return: one all-to-all each way, in which a rank takes part with what it holds and what it owns, so
that what it sends falls as the ranks grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.training.orthogonal import QkvHeads


@dataclass(frozen=True)
class MatrixSpan:
    """Where one matrix, as this tp rank holds it, lies in the flat buffer of its group."""

    start: int
    shape: tuple[int, int]
    tp_dim: int | None = None  # dim that tp splits; None where every tp rank holds the whole matrix
    qkv_heads: QkvHeads | None = None  # of this tp rank; None for other matrices

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

    @property
    def rank(self) -> int:
        """The dp rank that owns it."""
        return self.start // self.size

    def holders(self, span: MatrixSpan) -> range:
        """The dp ranks that hold a piece of a matrix."""
        return range(span.start // self.size, (span.stop - 1) // self.size + 1)

    def owner(self, span: MatrixSpan) -> int:
        """The dp rank that makes a matrix orthogonal: the one that holds its middle, so that work follows pieces."""
        return (span.start + span.stop - 1) // 2 // self.size

    def overlap(self, span: MatrixSpan, rank: int) -> slice:
        """The elements of a matrix in a rank's slice, counted from the slice's start; empty where there are none."""
        first, last = max(span.start, rank * self.size), min(span.stop, (rank + 1) * self.size)
        return slice(first - rank * self.size, max(first, last) - rank * self.size)

    def length(self, span: MatrixSpan, rank: int) -> int:
        """How many elements of a matrix a rank holds."""
        overlap = self.overlap(span, rank)
        return overlap.stop - overlap.start

    def inside(self) -> list[MatrixSpan]:
        """The matrices that lie in this slice whole."""
        return [span for span in self.matrices if self.holders(span) == range(self.rank, self.rank + 1)]

    def cut(self) -> list[MatrixSpan]:
        """The matrices of all ranks that a border cuts; the same list on every dp rank."""
        return [span for span in self.matrices if len(self.holders(span)) > 1]


def whole(matrix_RC: Tensor) -> Partition:
    """Describe a parameter that is one matrix and not partitioned."""
    rows, columns = matrix_RC.shape
    return Partition(0, matrix_RC.numel(), (MatrixSpan(0, (rows, columns)),))


@dataclass(frozen=True)
class Mail:
    """Pieces under way: complete when `work` is."""

    from_rank: tuple[Tensor, ...]  # flat, what each rank of the group sends here
    work: dist.Work | None

    def arrived(self) -> list[Tensor]:
        """Wait for them."""
        if self.work is not None:
            self.work.wait()
        return list(self.from_rank)


def exchange(
    to_rank: Sequence[Sequence[Tensor]], arriving: Sequence[int], like: Tensor, group: dist.ProcessGroup
) -> Mail:
    """Start one all-to-all: pieces for each rank of the group, against as many elements as each of them sends here."""
    outgoing = [sum(piece.numel() for piece in pieces) for pieces in to_rank]
    pieces = [piece.reshape(-1) for pieces in to_rank for piece in pieces]
    sent, received = torch.cat([*pieces, like.new_empty(0)]), like.new_empty(sum(arriving))
    work = dist.all_to_all_single(received, sent, list(arriving), outgoing, group=group, async_op=True)
    return Mail(received.split(list(arriving)), work)


def to_owners(update_F: Tensor, partition: Partition, group: dist.ProcessGroup) -> Mail | None:
    """Start to bring the cut matrices to their owners; None where no rank has any."""
    cut, me = partition.cut(), partition.rank
    if not cut:
        return None
    to_rank: list[list[Tensor]] = [[] for _ in range(group.size())]
    arriving = [0] * group.size()
    for span in cut:
        to_rank[partition.owner(span)].append(update_F[partition.overlap(span, me)])
        for holder in partition.holders(span) if partition.owner(span) == me else ():
            arriving[holder] += partition.length(span, holder)
    return exchange(to_rank, arriving, update_F, group)


def matrices_of(mail: Mail, partition: Partition) -> list[tuple[MatrixSpan, Tensor]]:
    """Put together the cut matrices that this rank owns."""
    rests = mail.arrived()
    found = []
    for span in (span for span in partition.cut() if partition.owner(span) == partition.rank):
        parts = []
        for holder in partition.holders(span):
            length = partition.length(span, holder)
            parts.append(rests[holder][:length])
            rests[holder] = rests[holder][length:]
        found.append((span, torch.cat(parts).view(span.shape)))
    return found


def from_owners(
    results: Iterable[tuple[MatrixSpan, Tensor]], into_F: Tensor, partition: Partition, group: dist.ProcessGroup
) -> None:
    """Write this rank's pieces of what the owners made of the cut matrices; the way back of `to_owners`."""
    cut, me = partition.cut(), partition.rank
    to_rank: list[list[Tensor]] = [[] for _ in range(group.size())]
    for span, result_RC in results:
        lengths = [partition.length(span, holder) for holder in partition.holders(span)]
        for holder, piece in zip(partition.holders(span), result_RC.reshape(-1).split(lengths), strict=True):
            to_rank[holder].append(piece)
    arriving = [0] * group.size()
    for span in cut:
        arriving[partition.owner(span)] += partition.length(span, me)
    rests = exchange(to_rank, arriving, into_F, group).arrived()
    for span in cut:
        owner, length = partition.owner(span), partition.length(span, me)
        into_F[partition.overlap(span, me)] = rests[owner][:length]
        rests[owner] = rests[owner][length:]
