"""Balance: a global batch into shares of equal cost, and a rank's images into packs under hard caps.

All arithmetic is in integers, so every rank, on any machine, computes the same placement of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from cogvit.errors import DataError
from data_pipeline.topology import Topology

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackLimits:
    """What one pack (one microbatch on one rank) holds at most, and how few packs a rank may have in a step."""

    tokens: int  # T
    images: int  # N
    text_tokens: int  # L
    min_packs: int = 1  # the pipeline needs one per stage


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each of B images goes: every rank has the same number of packs, some of which may be empty."""

    packs_per_rank: int
    rank: Ints  # [B], data-parallel
    pack: Ints  # [B], 0 .. packs_per_rank - 1

    def packs_of(self, dp_rank: int) -> tuple[Ints, ...]:
        """Return the images of each pack of a rank, as positions in the batch."""
        mine = self.rank == dp_rank
        return tuple(np.flatnonzero(mine & (self.pack == pack)) for pack in range(self.packs_per_rank))


def attention_cost(num_tokens: Ints, attention_tokens: int) -> Ints:
    """Return the cost of encoding images of n tokens: n (n0 + n), in units of 1 / n0 of a token's linear work."""
    return num_tokens * (attention_tokens + num_tokens)


def deal(cost: Ints, num_shares: int) -> Ints:
    """Split items into shares of equal cost; returns the share of each.

    Longest processing time first, many items at a time: in each round the lightest shares, all within the next item's
    cost of each other, take one item each.
    """
    order = np.argsort(-cost, kind="stable")
    share = np.empty(len(cost), np.int64)
    load = np.zeros(num_shares, np.int64)
    done = 0
    while done < len(order):
        lightest = np.argsort(load, kind="stable")
        width = int(np.searchsorted(load[lightest], load[lightest[0]] + cost[order[done]], side="right"))
        items = order[done : done + width]
        takers = lightest[: len(items)]
        share[items] = takers
        load[takers] += cost[items]
        done += len(items)
    return share


def place(
    share: Ints, cost: Ints, tokens: Ints, text_tokens: Ints, *, topology: Topology, limits: PackLimits
) -> Placement:
    """Place B images on ranks and packs: balanced in cost over the ranks of each group, every cap kept.

    All ranks get the same number of packs, the smallest for which the greedy placement succeeds.
    Errors: DataError when a single image or caption exceeds a cap.
    """
    for name, demand, cap in (
        ("data.tokens_per_pack", tokens, limits.tokens),
        ("data.text_tokens_per_pack", text_tokens, limits.text_tokens),
    ):
        if demand.max(initial=0) > cap:
            raise DataError(f"one sample needs {demand.max()} tokens of {name}={cap}; raise that")
    group = share // topology.shares_per_group
    members = [np.flatnonzero(group == number) for number in range(topology.num_groups)]
    members = [mine[np.argsort(-cost[mine], kind="stable")] for mine in members]
    loads = [np.array([tokens[mine].sum(), len(mine), text_tokens[mine].sum()]) for mine in members]
    caps = np.maximum([limits.tokens, limits.images, limits.text_tokens], 1)  # no text at all has a cap of 0
    fewest = -(-np.max(loads, axis=0) // (caps * topology.ranks_per_group))
    packs_per_rank = max(limits.min_packs, int(fewest.max()))
    items = np.stack([cost, tokens, text_tokens], axis=1)
    while True:
        bins = [_fill(items[mine].tolist(), limits, topology.ranks_per_group, packs_per_rank) for mine in members]
        if all(len(filled) == len(mine) for filled, mine in zip(bins, members, strict=True)):
            break
        packs_per_rank += 1
    spot = np.empty(len(cost), np.int64)
    for mine, filled in zip(members, bins, strict=True):
        spot[mine] = filled
    rank, pack = np.divmod(spot, packs_per_rank)
    return Placement(packs_per_rank, group * topology.ranks_per_group + rank, pack)


@dataclass(slots=True)
class _Room:
    """What is left of one pack."""

    spot: int
    tokens: int
    images: int
    text_tokens: int
    load: int = 0


def _fill(items: list[list[int]], limits: PackLimits, num_ranks: int, packs_per_rank: int) -> list[int]:
    """Put each (cost, tokens, text tokens), heaviest first, on the lightest rank with room, there in its lightest pack.

    Returns the spots (rank * packs_per_rank + pack); fewer than items when one finds no room.
    """
    rooms = [
        [
            _Room(rank * packs_per_rank + pack, limits.tokens, limits.images, limits.text_tokens)
            for pack in range(packs_per_rank)
        ]
        for rank in range(num_ranks)
    ]
    ranks = [(0, rank) for rank in range(num_ranks)]  # a heap by load
    spots: list[int] = []
    for cost, tokens, text_tokens in items:
        full = []
        fitting: list[_Room] = []
        while ranks and not fitting:
            load, rank = heappop(ranks)
            fitting = [
                room
                for room in rooms[rank]
                if room.tokens >= tokens and room.images and room.text_tokens >= text_tokens
            ]
            full.append((load, rank))
        if not fitting:
            return spots
        load, rank = full.pop()
        lightest = min(fitting, key=attrgetter("load"))
        lightest.tokens -= tokens
        lightest.images -= 1
        lightest.text_tokens -= text_tokens
        lightest.load += cost
        spots.append(lightest.spot)
        for entry in (*full, (load + cost, rank)):
            heappush(ranks, entry)
    return spots
