"""The plan: which samples make the global batch of a step, a pure function of the index, a spec, a seed and the step.

It knows nothing of ranks, so the sequence of global batches is the same on any number of them, and a step can be
replayed anywhere. Samples stream through each source epoch after epoch, in short runs of neighbors (reads stay
sequential); a look-ahead window of some steps takes its exact share of every source and is shuffled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.config import RunConfig
from cogvit.draws import mix
from cogvit.errors import DataError
from cogvit.model.naflex import naflex_grid
from data_pipeline.balance import attention_cost, deal
from data_pipeline.index import Index

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

RUN_SAMPLES = 64  # neighbors of a shard that stay together within an epoch's order; the window shuffles them apart
_FEISTEL_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplying by it spreads every bit upward


@dataclass(frozen=True, slots=True)
class Sizing:
    """How an image's size becomes a grid of patches."""

    kind: Literal["square", "naflex"]
    patch_size_px: int
    square_hw: tuple[int, int]  # grid of every image where kind is square
    max_patches: int
    enlarge: bool

    def grids(self, height_px: Ints, width_px: Ints) -> Ints:
        """Return the grid of each image: [B, 2] rows and columns of patches."""
        if self.kind == "square":
            return np.tile(np.array(self.square_hw, np.int64), (len(height_px), 1))
        sizes, inverse = np.unique(np.stack([height_px, width_px], axis=1), axis=0, return_inverse=True)
        grids = [_naflex_grid(height, width, self) for height, width in sizes.tolist()]
        return np.array(grids, np.int64).reshape(-1, 2)[inverse]


@lru_cache(1 << 16)
def _naflex_grid(height_px: int, width_px: int, sizing: Sizing) -> tuple[int, int]:
    return naflex_grid(height_px, width_px, sizing.patch_size_px, sizing.max_patches, enlarge=sizing.enlarge)


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """Everything besides index and seed that defines the sequence of global batches."""

    mixture: tuple[tuple[str, float], ...]  # source, weight; all samples are one pool where it is empty
    global_batch_images: int
    canonical_shares: int
    lookahead_steps: int
    sizing: Sizing
    attention_tokens: int  # n0: the length at which attention costs as much as everything else


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The B images of one optimizer step, in canonical order."""

    step: int
    rows: Ints  # [B], into the index
    epoch: Ints  # [B], of the image's source
    key: Ints  # [B], seed of every draw for the image
    grid_hw: Ints  # [B, 2]
    cost: Ints  # [B]
    share: Ints  # [B], 0 .. canonical_shares - 1; shares cost about the same


@dataclass(frozen=True, slots=True)
class _Pool:
    """The samples of one source, or all of them."""

    rows: Ints | None  # None: every row of the index
    size: int
    upto: Fraction  # share of the mixture up to and with this pool


def plan_spec(config: RunConfig) -> PlanSpec:
    """Return the part of a configuration that the plan depends on."""
    vision, data = config.vision, config.data
    branches = 3 if vision.mlp == "swiglu" else 2
    return PlanSpec(
        mixture=data.mixture,
        global_batch_images=data.global_batch_images,
        canonical_shares=data.canonical_shares,
        lookahead_steps=data.lookahead_steps,
        sizing=Sizing(data.sizing, vision.patch_size, vision.base_grid, data.max_patches, data.enlarge),
        # Per token and layer: 8 D^2 + 2 * branches * D * F of matrix products, 4 n D of attention.
        attention_tokens=2 * vision.embed_dim + branches * vision.mlp_dim // 2,
    )


def plan_hash(index: Index, spec: PlanSpec, seed: int) -> str:
    """Return the hash that names a sequence of global batches."""
    text = json.dumps([index.content_hash(), asdict(spec), seed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def plan(index: Index, spec: PlanSpec, seed: int, step: int) -> GlobalBatch:
    """Return the global batch of a step.

    Every sample of a source comes exactly once in each of the source's epochs, and each window of lookahead_steps holds
    every source's share of the mixture to within one sample, with no drift.
    Errors: DataError for a mixture that names an unknown source or gives one less than a sample a window.
    """
    batch, window_images = spec.global_batch_images, spec.global_batch_images * spec.lookahead_steps
    window, first = divmod(step * batch, window_images)
    slot = permute(np.arange(first, first + batch), window_images, "window", seed, window)
    rows, epoch = np.empty(batch, np.int64), np.empty(batch, np.int64)
    taken, before = 0, Fraction(0)
    for number, pool in enumerate(_pools(index, spec)):
        # Rounding the cumulative shares keeps the sum exact: the sources' counts always add up to the images so far.
        start = int(window * window_images * pool.upto) - int(window * window_images * before)
        stop = int((window + 1) * window_images * pool.upto) - int((window + 1) * window_images * before)
        mine = (slot >= taken) & (slot < taken + stop - start)
        rows[mine], epoch[mine] = _stream(pool, start + slot[mine] - taken, seed, number)
        taken, before = taken + stop - start, pool.upto
    found = index.rows[rows]
    key = mix(torch.from_numpy(found["sample_id"].copy()), seed, torch.from_numpy(epoch)).numpy()
    grid_hw = spec.sizing.grids(found["height_px"], found["width_px"])
    cost = attention_cost(grid_hw.prod(axis=1), spec.attention_tokens)
    return GlobalBatch(step, rows, epoch, key, grid_hw, cost, deal(cost, spec.canonical_shares))


def _pools(index: Index, spec: PlanSpec) -> Iterator[_Pool]:
    if not spec.mixture:
        yield _Pool(None, len(index), Fraction(1))
        return
    for name, weight in spec.mixture:
        if not 0.0 < weight < float("inf"):
            raise DataError(f"data.mixture gives {name!r} the weight {weight}; weights are positive")
    total = sum((Fraction(weight) for _, weight in spec.mixture), Fraction(0))
    window_images = spec.global_batch_images * spec.lookahead_steps
    upto = accumulate(Fraction(weight) / total for _, weight in spec.mixture)
    for (name, weight), share in zip(spec.mixture, upto, strict=True):
        if name not in index.sources:
            raise DataError(f"data.mixture names {name!r}; the shards' sources are {', '.join(index.sources)}")
        if weight * window_images < total:
            raise DataError(
                f"data.mixture gives {name!r} less than one of the {window_images} images of a window; raise its weight"
                f" from {weight} or data.lookahead_steps from {spec.lookahead_steps}"
            )
        rows = np.flatnonzero(index.rows["source"] == index.sources.index(name))
        if not len(rows):
            raise DataError(f"data.mixture names {name!r}, which has no usable sample")
        yield _Pool(rows, len(rows), share)


def _stream(pool: _Pool, position: Ints, seed: int, number: int) -> tuple[Ints, Ints]:
    """Return row and epoch at some positions of a pool's endless stream.

    An epoch walks through runs of RUN_SAMPLES neighbors in random order; where the runs begin is random too, and the
    rest that fills no run comes last.
    """
    epoch, at = np.divmod(position, pool.size)
    member = np.empty_like(at)
    num_runs = pool.size // RUN_SAMPLES
    for one in np.unique(epoch).tolist():
        mine = epoch == one
        run, inside = np.divmod(at[mine], RUN_SAMPLES)
        whole = run < num_runs
        run[whole] = permute(run[whole], num_runs, "run", seed, number, one)
        turn = int(_salts("turn", seed, number, one)[0]) % pool.size
        member[mine] = (run * RUN_SAMPLES + inside + turn) % pool.size
    return (member if pool.rows is None else pool.rows[member]), epoch


def permute(position: Ints, size: int, *names: int | str) -> Ints:
    """Return where a random permutation of range(size), which names select, sends some positions.

    A Feistel network over the next power of four, walked until it is back in range: no table, any size.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    salts = _salts(*names)
    moved = _feistel(position.astype(np.uint64), half_bits, salts)
    while (outside := moved >= size).any():
        moved[outside] = _feistel(moved[outside], half_bits, salts)
    return moved.astype(np.int64)


def _feistel(position: Words, half_bits: int, salts: Words) -> Words:
    half, rest, middle = np.uint64(half_bits), np.uint64(64 - half_bits), np.uint64(32)
    left, right = position >> half, position & np.uint64((1 << half_bits) - 1)
    for salt in salts[:_FEISTEL_ROUNDS]:
        word = (right ^ salt) * _ODD
        left, right = right, left ^ (((word ^ (word >> middle)) * _ODD) >> rest)
    return (left << half) | right


def _salts(*names: int | str) -> Words:
    """Return eight random words for a purpose."""
    return np.frombuffer(hashlib.blake2b(repr(names).encode()).digest(), "<u8").astype(np.uint64)
