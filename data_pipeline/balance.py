"""Balance: samples into parts of equal cost, and the images of a group of ranks into packs under hard caps.

All arithmetic that decides is exact, so every rank, on any machine, computes the same parts and packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import uniform
from cogvit.errors import DataError

Ints = NDArray[np.int64]
Costs = NDArray[np.float64]

EVENED_ROUNDS = 1024  # of `spread`: the heaviest items; what is lighter differs too little to matter
EVEN_ENOUGH = 1.002  # heaviest part over the mean, or rank over the bound: no swap or exchange is looked for
SWAPS_PER_PART = 4  # that `spread` makes at most
EXCHANGES_PER_RANK = 4  # that `place` makes at most
EXCHANGE_RANKS = 3  # of the lightest, that the heaviest may exchange with
EXCHANGE_CHOICES = 24  # images of a rank that an exchange is chosen from


@dataclass(frozen=True, slots=True)
class PackLimits:
    """What one pack (one microbatch on one rank) holds at most, and how few packs a rank may have in a step."""

    tokens: int  # T
    images: int  # N
    text_tokens: int  # L
    min_packs: int = 1  # the pipeline needs one per stage
    trims: bool = False  # whether packs are as long as what they hold asks for
    tensor_ranks: int = 1  # that share a pack's rows under sequence parallelism

    def rows(self, used: int, most: int) -> int:
        """Return how many rows a pack has that holds so many tokens, of at most so many: its size, trimmed or not.

        Trimmed in steps of 64 rows a tensor rank, so that what divides the size divides it still; a pack has rows.
        """
        step = 64 * self.tensor_ranks
        return most - (most - max(used, 1)) // step * step if self.trims else most


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each of B images of a group of ranks goes: each rank has the same number of packs, some may be empty."""

    packs_per_rank: int
    rank: Ints  # [B], inside the group
    pack: Ints  # [B], 0 .. packs_per_rank - 1

    def packs_of(self, rank: int) -> tuple[Ints, ...]:
        """Return the images of each pack of a rank, as positions in the batch."""
        mine = self.rank == rank
        return tuple(np.flatnonzero(mine & (self.pack == pack)) for pack in range(self.packs_per_rank))


def attention_cost(num_tokens: Ints, attention_tokens: int) -> Ints:
    """Return the cost of encoding images of n tokens: n (n0 + n), in units of 1 / n0 of a token's linear work."""
    return num_tokens * (attention_tokens + num_tokens)


def spread(cost: Ints, sizes: Ints, key: Ints, wanted: Costs | None = None) -> Ints:
    """Split items at random into parts of given sizes, each of which costs its size times the mean; returns the parts.

    wanted: what the parts cost instead, where that is close.

    A stratified draw: sorted by cost, the items fall into rounds in which every part takes one. Among the heaviest
    rounds, the part that is behind takes the round's heaviest item: the light ones even out what the heavy left.
    key [B] seeds the draw.
    """
    order = np.lexsort((key, -cost))
    part = np.repeat(np.arange(len(sizes)), sizes)
    inside = np.arange(len(part)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    when = (inside + uniform(torch.from_numpy(key)).numpy().astype(np.float64)) / sizes[part]
    part = part[np.argsort(when, kind="stable")]
    heaviest_first = cost[order].astype(np.float64)  # exact: far below 2^53
    wanted = sizes * (heaviest_first.sum() / max(len(part), 1)) if wanted is None else wanted
    ahead = np.bincount(part, heaviest_first, len(sizes)) - wanted
    num_rounds = int(sizes.max(initial=0))
    starts = np.arange(min(num_rounds, EVENED_ROUNDS) + 1) * len(part) // max(num_rounds, 1)
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        takers, costs = part[start:stop], heaviest_first[start:stop]
        np.subtract.at(ahead, takers, costs)
        takers = takers[np.argsort(ahead[takers], kind="stable")]
        np.add.at(ahead, takers, costs)
        part[start:stop] = takers
    _settle(part, heaviest_first, ahead)
    answer = np.empty_like(part)
    answer[order] = part
    return answer


def _settle(part: Ints, cost: Costs, ahead: Costs) -> None:
    """Swap items between the part that is most ahead and the one most behind until all are even; in place.

    Only an outlier needs it: rounds are narrow, and cannot make up for one item that is worth many.
    """
    members = np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part, minlength=len(ahead)))[:-1])
    held = np.array([len(one) > 0 for one in members], np.bool_)  # one without items has nothing to swap
    enough = (EVEN_ENOUGH - 1.0) / 2 * cost.sum() / len(ahead)
    for _ in range(SWAPS_PER_PART * int(held.sum())):
        most, least = int(np.where(held, ahead, -np.inf).argmax()), int(np.where(held, ahead, np.inf).argmin())
        wanted = min(ahead[most], -ahead[least])
        if wanted <= enough / 2 and ahead[most] <= enough:
            return
        mine, theirs = members[most], members[least][::-1]  # theirs: lightest first
        beside = np.searchsorted(cost[theirs], cost[mine] - wanted)
        miss, one, other = min(
            _nearest(cost[mine] - wanted, cost[theirs], np.clip(beside - side, 0, len(theirs) - 1)) for side in (0, 1)
        )
        if miss >= wanted:
            return
        mine[one], theirs[other] = theirs[other], mine[one]
        part[[mine[one], theirs[other]]] = most, least
        change = cost[theirs[other]] - cost[mine[one]]
        ahead[[most, least]] += -change, change
        members[most], members[least] = np.sort(mine), np.sort(theirs)


def _nearest(wanted: Costs, cost: Costs, at: Ints) -> tuple[float, int, int]:
    """Return how far cost[at] is from what is wanted where it is nearest, and the two places."""
    miss = np.abs(wanted - cost[at])
    best = int(miss.argmin())
    return float(miss[best]), best, int(at[best])


def place(
    cost: Ints, tokens: Ints, text_tokens: Ints, slots: Ints | None = None, *, num_ranks: int, limits: PackLimits
) -> Placement:
    """Place B samples on the packs of a group of ranks: balanced in cost over the ranks, every cap kept.

    slots: [B], image slots that each takes; one by default.

    All ranks get the same number of packs, the smallest for which the greedy placement succeeds: the heaviest image
    left goes to the lightest rank with room. Where caps stood in its way, exchanges between ranks even the loads out.
    Errors: DataError when a single image or caption exceeds a cap.
    """
    slots = np.ones_like(cost) if slots is None else slots
    check_caps(np.stack([tokens, text_tokens, slots], axis=1), limits)
    order = np.argsort(-cost, kind="stable")
    items = np.stack([cost, tokens, text_tokens, slots], axis=1)[order].tolist()
    load = np.array([tokens.sum(), text_tokens.sum(), slots.sum()])
    caps = np.maximum(caps_of(limits), 1)  # no text at all has a cap of 0
    packs_per_rank = max(limits.min_packs, int((-(-load // (caps * num_ranks))).max()))
    while len(spots := _fill(items, limits, num_ranks, packs_per_rank)) < len(items):
        packs_per_rank += 1
    spot = np.empty(len(cost), np.int64)
    spot[order] = spots
    demand = np.stack([cost, tokens, text_tokens, slots], axis=1)
    room = np.tile(caps_of(limits), (num_ranks * packs_per_rank, 1))
    np.subtract.at(room, spot, demand[:, 1:])
    load = np.zeros(num_ranks, np.int64)
    np.add.at(load, spot // packs_per_rank, cost)
    _even_out(_Loads(spot, demand, room, load))
    rank, pack = np.divmod(spot, packs_per_rank)
    return Placement(packs_per_rank, rank, pack)


def caps_of(limits: PackLimits) -> Ints:
    """Return what a pack holds of tokens, text tokens and images."""
    return np.array([limits.tokens, limits.text_tokens, limits.images], np.int64)


def check_caps(demand: Ints, limits: PackLimits) -> None:
    """Look whether every sample fits a pack alone; demand is [B, 3] as `caps_of`. Errors: DataError."""
    most = demand.max(axis=0, initial=0)
    for name, need, cap in (
        ("data.tokens_per_pack", most[0], limits.tokens),
        ("data.text_tokens_per_pack", most[1], limits.text_tokens),
    ):
        if need > cap:
            raise DataError(f"one sample needs {need} tokens of {name}={cap}; raise that")
    if most[2] > limits.images:
        raise DataError(f"one sample has {most[2]} images, and data.images_per_pack={limits.images}; raise that")


@dataclass(slots=True)
class _Loads:
    """A placement that is being evened out."""

    spot: Ints  # [B], rank * packs_per_rank + pack
    items: Ints  # [B, 4]: cost, tokens, text tokens and image slots
    room: Ints  # [spots, 3]: what each pack still takes of tokens, text tokens and images
    load: Ints  # [ranks], cost

    def images_of(self, rank: int) -> Ints:
        """Return some images of a rank, evenly spaced."""
        mine = np.flatnonzero(self.spot // (len(self.room) // len(self.load)) == rank)
        return mine[:: max(1, len(mine) // EXCHANGE_CHOICES)]

    def exchange(self, heavy: int, light: int) -> bool:
        """Give an image of the heavy rank for one or two of the light one, where the caps allow it and it evens loads.

        One for two matters at full packs: of equal tokens, the longer image costs more.
        """
        mine, theirs = self.images_of(heavy), self.images_of(light)
        first, second = np.triu_indices(len(theirs))
        theirs = np.stack([theirs[first], theirs[second]], axis=1)
        theirs = theirs[self.spot[theirs[:, 0]] == self.spot[theirs[:, 1]]]
        alone = theirs[:, 0] == theirs[:, 1]
        bundle = self.items[theirs].sum(axis=1) // (1 + alone[:, None])
        moved = self.items[mine][:, None] - bundle
        fits = (moved[..., 1:] <= self.room[self.spot[theirs[:, 0]]]).all(axis=-1)
        fits &= (-moved[..., 1:] <= self.room[self.spot[mine]][:, None]).all(axis=-1)
        gap, change = self.load[heavy] - self.load[light], moved[..., 0]
        lack = np.where(fits & (change > 0) & (change < gap), np.abs(gap - 2 * change), gap)
        if lack.min(initial=gap) >= gap:
            return False
        one, other = np.unravel_index(lack.argmin(), lack.shape)
        here, there = self.spot[mine[one]], self.spot[theirs[other, 0]]
        self.spot[theirs[other]], self.spot[mine[one]] = here, there
        self.room[here] += moved[one, other, 1:]
        self.room[there] -= moved[one, other, 1:]
        self.load[[heavy, light]] += np.array([-1, 1]) * change[one, other]
        return True


def _even_out(loads: _Loads) -> None:
    """Relieve the heaviest rank by exchanges with the lightest that can, until it is close to the bound."""
    enough = EVEN_ENOUGH * max(loads.load.mean(), loads.items[:, 0].max(initial=0))
    for _ in range(EXCHANGES_PER_RANK * len(loads.load)):
        heavy = int(loads.load.argmax())
        if loads.load[heavy] <= enough:
            return
        lightest = np.argsort(loads.load, kind="stable")[:EXCHANGE_RANKS].tolist()
        if not any(loads.exchange(heavy, light) for light in lightest if light != heavy):
            return


@dataclass(slots=True)
class _Room:
    """What is left of one pack."""

    spot: int
    tokens: int
    images: int
    text_tokens: int
    load: int = 0


def _fill(items: list[list[int]], limits: PackLimits, num_ranks: int, packs_per_rank: int) -> list[int]:
    """Put each (cost, tokens, text tokens, slots), heaviest first, on the lightest rank with room, its lightest pack.

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
    for cost, tokens, text_tokens, slots in items:
        full = []
        fitting: list[_Room] = []
        while ranks and not fitting:
            load, rank = heappop(ranks)
            fitting = [
                room
                for room in rooms[rank]
                if room.tokens >= tokens and room.images >= slots and room.text_tokens >= text_tokens
            ]
            full.append((load, rank))
        if not fitting:
            return spots
        load, rank = full.pop()
        lightest = min(fitting, key=attrgetter("load"))
        lightest.tokens -= tokens
        lightest.images -= slots
        lightest.text_tokens -= text_tokens
        lightest.load += cost
        spots.append(lightest.spot)
        for entry in (*full, (load + cost, rank)):
            heappush(ranks, entry)
    return spots
