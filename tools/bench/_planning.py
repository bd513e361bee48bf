"""What planning costs and how even its batches are, simulated: every node of a cluster plans its part of some steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

from data_pipeline.balance import PackLimits, Placement, place
from data_pipeline.index import Index
from data_pipeline.merge import temporary_corpus
from data_pipeline.plan import GlobalBatch, Planner
from data_pipeline.select import Choice, select
from data_pipeline.sizing import Sizing
from data_pipeline.spec import PlanSpec
from tools.bench._corpora import indexed

Ints = NDArray[np.int64]

PATCH_PX = 14
ATTENTION_TOKENS = 8192
IMAGES_PER_RANK = 32
RANKS_PER_NODE = 8
LOOKAHEAD_STEPS = 8
WINDOWS_PER_EPOCH = 2.7  # so that the steps that are looked at draw from two epochs
STEPS = 2


@dataclass(frozen=True)
class Lengths:
    """A distribution of images' lengths in patches."""

    name: str
    longest: int
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]
    spare: float  # T over the mean of a rank's tokens


def distributions() -> tuple[Lengths, ...]:
    """Return the three distributions: their imbalance of random batches on 64 ranks is 21, 35 and 64 %."""
    return (
        Lengths("NaFlex lengths <= 1024", 1024, lambda rng, size: rng.lognormal(6.0, 0.8, size), 1.015),
        Lengths("lognormal <= 4096", 4096, lambda rng, size: rng.lognormal(6.0, 0.8, size), 1.018),
        Lengths("heavy tail <= 16384", 16384, lambda rng, size: 256 * (1 + rng.pareto(1.1, size)), 1.28),
    )


@dataclass(frozen=True)
class Balance:
    """What a simulated cluster did."""

    planner_ms: float  # of one node and step, one core, everything amortized
    load_over_bound: float  # worst step: heaviest rank over max(mean, largest image)
    valid_tokens: float  # of k packs of T
    valid_possible: float  # at most, for loads within 1 % of the bound: see `possible`
    tokens_per_pack: int
    packs: int
    over_cap: int  # packs
    foreign: int  # images inside the stretch of the index that another node reads


def synthetic_index(lengths: Lengths, size: int, images_a_shard: int = 10_000, seed: int = 0) -> Index:
    """Return an index without files whose images have about such lengths."""
    rng = np.random.default_rng(seed)
    patches = np.clip(lengths.draw(rng, size), 16, lengths.longest)
    aspect = np.exp(rng.normal(0, 0.35, size))
    height = np.maximum(1, np.sqrt(patches * aspect).astype(np.int32))
    width = np.maximum(1, (patches / height).astype(np.int32))
    corpus = temporary_corpus("", indexed(PATCH_PX * height, PATCH_PX * width, images_a_shard))
    return Index(corpus, select(corpus, Choice()))


def simulate(lengths: Lengths, num_ranks: int) -> Balance:
    """Plan and place some steps on every node of a cluster."""
    nodes, images = num_ranks // RANKS_PER_NODE, num_ranks * IMAGES_PER_RANK
    sizing = Sizing("naflex", PATCH_PX, (1, 1), lengths.longest, enlarge=False)
    spec = PlanSpec((), images, nodes, LOOKAHEAD_STEPS, sizing, ATTENTION_TOKENS)
    index = synthetic_index(lengths, int(WINDOWS_PER_EPOCH * spec.smallest_window_images))
    planner = Planner(index, spec, 1)
    first = 2 * LOOKAHEAD_STEPS + 2  # the window in which an epoch ends
    steps = range(first, first + STEPS)
    start_s = time.process_time()
    batches = [[planner.batch(step, [node]) for step in steps] for node in range(nodes)]
    plan_s = time.process_time() - start_s  # of two epochs and one window
    mean_tokens = np.mean([batch.grid_hw.prod(axis=1).sum() for mine in batches for batch in mine]) / RANKS_PER_NODE
    limits = PackLimits(max(int(mean_tokens * lengths.spare), lengths.longest), 4 * IMAGES_PER_RANK, 0)
    start_s = time.process_time()
    placed = [[_place(batch, limits) for batch in mine] for mine in batches]
    place_s = time.process_time() - start_s
    spent_s = plan_s / (2 * WINDOWS_PER_EPOCH * LOOKAHEAD_STEPS) + place_s / STEPS
    results = [_judge(batches, placed, step, limits) for step in range(STEPS)]
    rows = [np.concatenate([batch.rows for batch in mine]) for mine in batches]
    return Balance(
        planner_ms=spent_s / nodes * 1e3,
        load_over_bound=max(one[0] for one in results),
        valid_tokens=float(np.mean([one[1] for one in results])),
        valid_possible=min(one[2] for one in results),
        tokens_per_pack=limits.tokens,
        packs=max(one.packs_per_rank for mine in placed for one in mine),
        over_cap=sum(one[3] for one in results),
        foreign=sum(int((rows[node] <= rows[node - 1].max()).sum()) for node in range(1, nodes)),
    )


def _place(batch: GlobalBatch, limits: PackLimits) -> Placement:
    tokens = batch.grid_hw.prod(axis=1)
    return place(batch.cost, tokens, 0 * tokens, num_ranks=RANKS_PER_NODE, limits=limits)


def _judge(
    batches: list[list[GlobalBatch]], placed: list[list[Placement]], step: int, limits: PackLimits
) -> tuple[float, float, float, int]:
    """Return load over bound, valid tokens, the most valid tokens possible, and packs over their cap of one step."""
    pairs = [(mine[step], where[step]) for mine, where in zip(batches, placed, strict=True)]
    packs = max(where.packs_per_rank for _, where in pairs)
    cost = np.concatenate([batch.cost for batch, _ in pairs])
    tokens = np.concatenate([batch.grid_hw.prod(axis=1) for batch, _ in pairs])
    rank = np.concatenate([RANKS_PER_NODE * node + where.rank for node, (_, where) in enumerate(pairs)])
    pack = rank * packs + np.concatenate([where.pack for _, where in pairs])
    num_ranks = RANKS_PER_NODE * len(pairs)
    load = np.bincount(rank, cost, num_ranks)
    bound = max(load.mean(), cost.max())
    used = np.bincount(pack, tokens, num_ranks * packs)
    over = int((used > limits.tokens).sum() + (np.bincount(pack) > limits.images).sum())
    valid = tokens.sum() / (num_ranks * packs * limits.tokens)
    return float(load.max() / bound), float(valid), possible(cost, tokens, num_ranks, 1.01 * bound), over


def possible(cost: Ints, tokens: Ints, num_ranks: int, limit: float) -> float:
    """Return the most valid tokens that any placement reaches whose ranks stay within a limit of cost.

    The longest images that cannot share a rank have one each; what else fits there costs at least n0 a token. The other
    ranks hold the rest, and T is at least their mean.
    """
    longest = np.argsort(-cost)
    apart = longest[: int((cost > limit / 2).sum())]
    held = tokens[apart] + (limit - cost[apart]) / ATTENTION_TOKENS
    mean = tokens.sum() / num_ranks
    short = np.sort(held[held < mean])
    others = num_ranks - len(short)
    return 1.0 if not others else float(mean / ((tokens.sum() - short.sum()) / others))


def karmarkar_karp(cost: list[int], num_parts: int) -> list[int]:
    """Return the loads of the largest differencing method, without caps: what the placement is compared with."""
    serial = count()
    heap = [(-one, next(serial), [0] * (num_parts - 1) + [one]) for one in cost]
    heapify(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heappop(heap), heappop(heap)
        merged = sorted(a + b for a, b in zip(first, reversed(second), strict=True))
        heappush(heap, (merged[0] - merged[-1], next(serial), merged))
    return heap[0][2]


def table(sizes: tuple[int, ...] = (64, 4096)) -> Iterator[str]:
    """Yield the lines of the table."""
    columns = ("lengths", "ranks", "planner ms per step and node", "max load / bound", "valid tokens (most possible)")
    yield "| " + " | ".join((*columns, "T", "packs", "over a cap", "read by another node")) + " |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for lengths in distributions():
        for num_ranks in sizes:
            one = simulate(lengths, num_ranks)
            yield (
                f"| {lengths.name} | {num_ranks:,} | {one.planner_ms:.1f} | {one.load_over_bound:.4f} |"
                f" {one.valid_tokens:.1%} ({one.valid_possible:.1%}) | {one.tokens_per_pack:,} | {one.packs} |"
                f" {one.over_cap} | {one.foreign} |"
            )


def methods() -> Iterator[str]:
    """Yield the comparison of methods for one node of 8 ranks x 32 images, without caps that bind."""
    yield "| lengths | method | idle (1 - mean / max), mean of 20 | ms |"
    yield "|---|---|---|---|"
    for lengths in distributions():
        index = synthetic_index(lengths, 20 * RANKS_PER_NODE * IMAGES_PER_RANK)
        sizes = index.take(index.rows_of())
        tokens = sizes["height_px"].astype(np.int64) * sizes["width_px"] // PATCH_PX**2
        batches = [part * (ATTENTION_TOKENS + part) for part in np.split(tokens, 20)]
        for name, loads_of in (
            ("as it comes", lambda cost: cost.reshape(RANKS_PER_NODE, -1).sum(axis=1)),
            ("greedy, exchanges", _greedy_loads),
            ("Karmarkar-Karp", lambda cost: np.array(karmarkar_karp(cost.tolist(), RANKS_PER_NODE))),
        ):
            start_s = time.process_time()
            loads = [loads_of(cost) for cost in batches]
            spent_ms = (time.process_time() - start_s) / len(batches) * 1e3
            idle = np.mean([1 - load.mean() / load.max() for load in loads])
            yield f"| {lengths.name} | {name} | {idle:.3%} | {spent_ms:.1f} |"


def _greedy_loads(cost: Ints) -> Ints:
    limits = PackLimits(1 << 40, 1 << 20, 0)
    placement = place(cost, cost // ATTENTION_TOKENS, 0 * cost, num_ranks=RANKS_PER_NODE, limits=limits)
    return np.bincount(placement.rank, cost, RANKS_PER_NODE).astype(np.int64)
