"""Placement where a step has two phases, each of which all ranks wait for: the vision tower's and the language model's.

With a pipeline the encoder runs over all stages before the language model does, so a rank that is even in the sum alone
may still keep the others waiting twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.balance import PackLimits, Placement, caps_of, check_caps

Ints = NDArray[np.int64]

_UNIT = 1 << 24  # what a rank's even share of a phase is counted in: integers decide alike on every machine
_EVEN_ENOUGH = _UNIT + _UNIT // 100
_TRADES_PER_RANK = 8
_PARTNERS = 8  # ranks that the fullest one trades with


def place_phases(
    phases: Ints, tokens: Ints, text_tokens: Ints, slots: Ints, *, num_ranks: int, limits: PackLimits
) -> Placement:
    """Place B samples on the packs of a group of ranks: both phases [B, 2] balanced over the ranks, every cap kept.

    The heaviest sample left goes to the rank whose load points least its way; trades between ranks even out the rest.
    Errors: DataError as `place`.
    """
    demand = np.stack([tokens, text_tokens, slots], axis=1)
    check_caps(demand, limits)
    share = _in_shares(phases, num_ranks)
    caps = np.maximum(caps_of(limits), 1)
    packs_per_rank = max(limits.min_packs, int((-(-demand.sum(axis=0) // (caps * num_ranks))).max(initial=0)))
    while (found := _fill(share, demand, num_ranks, packs_per_rank, limits)) is None:
        packs_per_rank += 1
    _trade(found, share, demand)
    rank, pack = np.divmod(found.spot, packs_per_rank)
    return Placement(packs_per_rank, rank, pack)


def _in_shares(phases: Ints, num_ranks: int) -> Ints:
    """Costs as parts of a rank's even share of their phase, which is _UNIT."""
    total = [max(int(one), 1) for one in phases.sum(axis=0)]
    columns = [
        [cost * num_ranks * _UNIT // whole for cost in column]  # Python's integers: these products pass 2^63
        for column, whole in zip(phases.T.tolist(), total, strict=True)
    ]
    return np.array(columns, np.int64).reshape(2, -1).T


@dataclass(slots=True)
class _Found:
    """A placement that is being made."""

    spot: Ints  # [B], rank * packs_per_rank + pack
    load: Ints  # [ranks, 2]
    room: Ints  # [ranks, packs, 3]: tokens, text tokens, image slots


def _fill(share: Ints, demand: Ints, num_ranks: int, packs: int, limits: PackLimits) -> _Found | None:
    """Put every sample somewhere; None where one finds no room."""
    room = np.tile(caps_of(limits), (num_ranks, packs, 1))
    found = _Found(np.full(len(share), -1, np.int64), np.zeros((num_ranks, 2), np.int64), room)
    filled = np.zeros((num_ranks, packs), np.int64)
    for item in np.argsort(-share.max(axis=1), kind="stable").tolist():
        own, wants = share[item], demand[item]
        fits = (found.room >= wants).all(axis=2)
        able = np.flatnonzero(fits.any(axis=1))
        if not len(able):
            return None
        toward = (found.load[able] * (own >> 12)).sum(axis=1)  # far below 2^63: loads are a few units
        rank = int(able[toward.argmin()])
        pack = int(np.where(fits[rank], filled[rank], np.iinfo(np.int64).max).argmin())
        found.spot[item] = rank * packs + pack
        found.load[rank] += own
        found.room[rank, pack] -= wants
        filled[rank, pack] += own.sum()
    return found


def _trade(found: _Found, share: Ints, demand: Ints) -> None:
    """Swap samples between the rank that is fullest in a phase and others while that evens loads; in place."""
    packs = found.room.shape[1]
    for _ in range(_TRADES_PER_RANK * len(found.load)):
        heavy, phase = (int(place) for place in np.unravel_index(found.load.argmax(), found.load.shape))
        if found.load[heavy, phase] <= _EVEN_ENOUGH:
            return
        mine = np.flatnonzero(found.spot // packs == heavy)
        best, chosen = int(found.load[heavy].max()), None
        for light in np.argsort(found.load[:, phase], kind="stable")[:_PARTNERS].tolist():
            theirs = np.append(np.flatnonzero(found.spot // packs == light), -1) if light != heavy else mine[:0]
            if not len(theirs):
                continue
            gone = np.where((theirs >= 0)[:, None], share[theirs], 0)
            moved = share[mine][:, None] - gone
            after = np.maximum(found.load[heavy] - moved, found.load[light] + moved).max(axis=2)
            for place in np.argsort(after, axis=None, kind="stable")[:4].tolist():
                one, other = (int(x) for x in np.unravel_index(place, after.shape))
                if after[one, other] >= best:
                    break
                swap = _room_for(found, demand, int(mine[one]), int(theirs[other]), light)
                if swap is not None:
                    best, chosen = int(after[one, other]), swap
                    break
        if chosen is None:
            return
        _do(found, share, demand, *chosen)


Swap = tuple[int, int, int]  # a sample, the spot that it goes to, and the sample (-1: none) that takes its place


def _room_for(found: _Found, demand: Ints, mine: int, theirs: int, light: int) -> Swap | None:
    """Where a sample of the fullest rank may go, one of a lighter rank taking its place; None where caps forbid it."""
    room = found.room.reshape(-1, 3)
    packs = found.room.shape[1]
    if theirs < 0:
        free = [light * packs + pack for pack in range(packs) if (found.room[light, pack] >= demand[mine]).all()]
        return (mine, free[0], -1) if free else None
    here, there = int(found.spot[mine]), int(found.spot[theirs])
    moved = demand[mine] - demand[theirs]
    fits = bool((room[there] >= moved).all() and (room[here] >= -moved).all())
    return (mine, there, theirs) if fits else None


def _do(found: _Found, share: Ints, demand: Ints, mine: int, there: int, theirs: int) -> None:
    room, packs = found.room.reshape(-1, 3), found.room.shape[1]
    here = int(found.spot[mine])
    moved = share[mine] - (share[theirs] if theirs >= 0 else 0)
    wants = demand[mine] - (demand[theirs] if theirs >= 0 else 0)
    found.load[here // packs] -= moved
    found.load[there // packs] += moved
    room[here] += wants
    room[there] -= wants
    found.spot[mine] = there
    if theirs >= 0:
        found.spot[theirs] = here
