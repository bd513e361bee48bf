"""The order of a share's samples, in two levels: its shards, dealt anew in every epoch to blocks of equal mean cost.

A share reads one block of each source at a time, a few shards, whatever the size of the corpus; only these samples are
looked at. Which of them come when inside the block is the plan's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import mix, uniform
from data_pipeline.balance import spread
from data_pipeline.cells import Cells
from data_pipeline.index import Index

Ints = NDArray[np.int64]
Costs = NDArray[np.float64]

PIECE_IMAGES = 1 << 16  # of one shard that stay together at most
BLOCK_PIECES = (8, 16)  # shards that differ add up to blocks that do not; a node keeps the files of its shares open
BLOCK_IMAGES = (1 << 13, 1 << 18)  # whatever the pieces
_CELLS_A_SHARE = 32  # from which on a cut inside a cell need not look at its samples
_PIECE_SALT = 0x70696563  # "piec"


@dataclass(frozen=True, eq=False)
class Stream:
    """One source, epoch after epoch. Draw number p of the stream falls into epoch p // S, S its size.

    A position is the number of a sample among the source's, in the order of the corpus.
    """

    number: int
    source: str | None  # None: all samples as one
    index: Index
    cells: Cells
    bounds: Ints | None  # [C + 1]: share c owns these positions; None where every share draws from all
    before: Fraction  # share of the mixture before this source, and up to and with it
    upto: Fraction

    def __len__(self) -> int:
        return int(self.cells.images[-1]) if len(self.cells) else 0

    def drawn(self, images: int) -> int:
        """Return how many of the run's first images are this source's; with no drift, the sources' sum is exact."""
        before, upto = self.before, self.upto
        return images * upto.numerator // upto.denominator - images * before.numerator // before.denominator

    def drawn_before(self, draws: int, share: int) -> int:
        """Return how many of the first draws fell to the shares before one, 0 .. C."""
        assert self.bounds is not None
        epoch, at = divmod(draws, len(self))
        bound = int(self.bounds[share])  # without a limit: the product passes 2^63 at 3.04e9 samples
        return epoch * bound + bound * at // len(self)

    def drawn_by(self, draws: int, share: int) -> int:
        """Return how many of the first draws fell to a share."""
        return self.drawn_before(draws, share + 1) - self.drawn_before(draws, share)

    def size_of(self, share: int) -> int:
        """Return how many samples a share owns."""
        assert self.bounds is not None
        return int(self.bounds[share + 1] - self.bounds[share])

    @cached_property
    def _shards(self) -> tuple[Ints, Ints]:
        """The shards that have samples [K], and the position of the first of each, then S [K + 1]."""
        shard = self.cells.shard
        first = np.append(0, 1 + np.flatnonzero(shard[1:] != shard[:-1]))[: len(shard)]
        ends = self.cells.images[np.maximum(first - 1, 0)] * (first > 0)
        return shard[first].astype(np.int64), np.append(ends, len(self))

    def rows_at(self, position: Ints) -> Ints:
        """Return the rows at some positions."""
        shards, start = self._shards
        place = np.searchsorted(start, position, "right") - 1
        rows = np.zeros(len(position), np.int64)
        for one in np.unique(place).tolist():
            here = place == one
            rows[here] = self.index.rows_of_shard(int(shards[one]), self.source)[position[here] - start[one]]
        return rows

    def edges(self, low: int, high: int) -> Ints:
        """Return where the pieces of a stretch of positions begin, then its end."""
        _, start = self._shards
        first, last = np.searchsorted(start, (low, high), "right")
        inside = np.concatenate([[low], start[first:last], [high]])
        longer = np.flatnonzero(np.diff(inside) > PIECE_IMAGES).tolist()
        more = [np.arange(inside[one] + PIECE_IMAGES, inside[one + 1], PIECE_IMAGES) for one in longer]
        return np.unique(np.concatenate([inside, *more])).astype(np.int64)

    def cost_before(self, position: Ints) -> Costs:
        """Return what the samples before some positions cost, evenly inside each cell."""
        cells = self.cells
        cell = np.minimum(np.searchsorted(cells.images, position, "left"), len(cells) - 1)
        lower = np.maximum(cell - 1, 0)
        images, cost = cells.images[lower] * (cell > 0), cells.cost[lower] * (cell > 0)
        share = (position - images) / (cells.images[cell] - images)
        return cost + share * (cells.cost[cell] - cost)


def cut_shares(cells: Cells, shares: int, costs_of: Callable[[Ints], Costs]) -> Ints:
    """Return the positions that cut a source into shares of equal cost: [C + 1].

    costs_of returns what the samples at some positions cost; it is asked only where shares are short.
    """
    if not len(cells):
        return np.zeros(shares + 1, np.int64)
    wanted = float(cells.cost[-1]) / shares * np.arange(1, shares)
    cell = np.searchsorted(cells.cost, wanted)
    lower = np.maximum(cell - 1, 0)
    before, cost = cells.images[lower] * (cell > 0), cells.cost[lower] * (cell > 0)
    images = cells.images[cell] - before
    if len(cells) >= _CELLS_A_SHARE * shares:
        inside = np.rint(images * (wanted - cost) / (cells.cost[cell] - cost)).astype(np.int64)
    else:
        inside = np.zeros(len(cell), np.int64)
        for one in np.unique(cell).tolist():
            here = cell == one
            start, stop = int(before[here][0]), int(cells.images[one])
            inside[here] = np.searchsorted(np.cumsum(costs_of(np.arange(start, stop))), wanted[here] - cost[here][0])
    return np.concatenate([[0], before + inside, [cells.images[-1]]]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a share in an epoch."""

    start: Ints  # [P], of each piece, as a position of the stream; the pieces in their order
    stop: Ints  # [P]
    first_piece: Ints  # [blocks + 1]
    bounds: Ints  # [blocks + 1], of each block in the share's epoch

    def pieces(self, block: int) -> slice:
        """Return the pieces of a block."""
        return slice(int(self.first_piece[block]), int(self.first_piece[block + 1]))


def blocks_of(stream: Stream, share: int, epoch: int, seed: int, block_images: int) -> Blocks:
    """Deal the pieces of a share to blocks of about so many images, which cost the same an image.

    The first block has half to one and a half of them, so that the shares of a node do not change blocks at once.
    """
    assert stream.bounds is not None
    edges = stream.edges(*stream.bounds[share : share + 2].tolist())
    start, stop = edges[:-1], edges[1:]
    key = mix(torch.from_numpy(start.copy()), seed, stream.number, epoch, _PIECE_SALT)
    size = stream.size_of(share)
    fewest, most = (pieces * size / len(start) for pieces in BLOCK_PIECES)
    images = min(max(min(max(block_images, fewest), most), BLOCK_IMAGES[0]), BLOCK_IMAGES[1])
    ends = _block_ends(len(start), size / images, float(uniform(key[:1], share)))
    part = np.zeros(len(start), np.int64)
    if len(ends) > 1:
        cost = np.diff(stream.cost_before(edges))
        mean = cost.sum() / size
        # What a piece costs beyond its images, on top of what the mean piece costs.
        value = cost - mean * (stop - start) + cost.mean()
        part = spread(np.rint(value).astype(np.int64), np.diff(ends, prepend=0), key.numpy())
    order = np.lexsort((key.numpy(), part))
    start, stop = start[order], stop[order]
    first_piece = np.append(0, ends)
    return Blocks(start, stop, first_piece, np.append(0, np.cumsum(stop - start))[first_piece])


def _block_ends(num_pieces: int, num_blocks: float, phase: float) -> Ints:
    """Return how many pieces there are up to the end of each block."""
    if num_blocks < 2.0:
        return np.array([num_pieces])
    a_block = num_pieces / num_blocks
    ends = np.ceil((0.5 + phase + np.arange(int(num_blocks) + 1)) * a_block).astype(np.int64)
    return np.unique(np.append(ends[ends <= num_pieces - a_block / 2], num_pieces))


def rows_of_block(stream: Stream, blocks: Blocks, block: int) -> Ints:
    """Return the rows of a block, piece after piece."""
    shards, first = stream._shards
    parts = []
    mine = blocks.pieces(block)
    for start, stop in zip(blocks.start[mine].tolist(), blocks.stop[mine].tolist(), strict=True):
        place = int(np.searchsorted(first, start, "right")) - 1
        rows = stream.index.rows_of_shard(int(shards[place]), stream.source)
        parts.append(rows[start - int(first[place]) : stop - int(first[place])])
    return np.concatenate([np.zeros(0, np.int64), *parts])
