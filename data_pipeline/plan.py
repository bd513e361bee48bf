"""The plan: which samples make the global batch of a step, a pure function of the index, a spec, a seed and the step.

It knows nothing of ranks, so the sequence of global batches is the same on any number of them, and a step can be
replayed anywhere. The samples of a source belong to C canonical shares: stretches of neighbors that cost the same.
Every share walks through its own stretch, epoch after epoch; whoever trains on a share plans it alone and reads nothing
of the others. A window of some steps takes its exact part of every source; inside an epoch the windows of a share, and
inside a window its steps, cost the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.config import RunConfig
from cogvit.draws import mix
from cogvit.errors import DataError
from cogvit.model.config import CogViTConfig, TextConfig
from data_pipeline.balance import attention_cost, spread
from data_pipeline.index import Index
from data_pipeline.permutation import permute
from data_pipeline.sizing import Sizing, sizing_of

Ints = NDArray[np.int64]

VERSION = 3  # of the sequence: the same spec gives other batches in another version
FEWEST_SAMPLES = 64  # of a source in each share; a smaller source belongs to all shares
FEWEST_DRAWS = 4  # of a source in each share and window; likewise (at 2 or less, rounding could ask for less than none)
_WINDOW_SALT = 0x77696E64  # "wind"
_STEP_SALT = 0x73746570  # "step"


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """Everything besides index and seed that defines the sequence of global batches."""

    mixture: tuple[tuple[str, float], ...]  # source, weight; all samples are one pool where it is empty
    global_batch_images: int
    canonical_shares: int
    lookahead_steps: int
    sizing: Sizing
    attention_tokens: int  # n0: the length at which attention costs as much as everything else
    batch_schedule: tuple[tuple[int, int], ...] = ()  # step, global_batch_images from it on
    budget_schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()  # step, sizing.budgets from it on

    @property
    def smallest_window_images(self) -> int:
        """Images that every look-ahead window has at least."""
        return self.lookahead_steps * min([self.global_batch_images, *(images for _, images in self.batch_schedule)])

    def batch_images(self, step: int) -> int:
        """Return the images of a step's global batch."""
        return _in_force(self.batch_schedule, step, self.global_batch_images)

    def images_before(self, window: int) -> int:
        """Return the images of all look-ahead windows before one."""
        end, total, images, since = window * self.lookahead_steps, 0, self.global_batch_images, 0
        for start, later in self.batch_schedule:
            if start >= end:
                break
            total, images, since = total + images * (start - since), later, start
        return total + images * (end - since)

    def window_of(self, images: int) -> int:
        """Return the look-ahead window that holds an image, by its number in the run."""
        left, size, since = images, self.global_batch_images, 0
        for start, later in self.batch_schedule:
            if left < size * (start - since):
                break
            left, size, since = left - size * (start - since), later, start
        return (since + left // size) // self.lookahead_steps

    def sizing_at(self, step: int) -> Sizing:
        """Return how the images of a step are sized."""
        return replace(self.sizing, budgets=_in_force(self.budget_schedule, step, self.sizing.budgets))


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The images of some shares of one optimizer step, share by share; B of them where the shares are all."""

    step: int
    rows: Ints  # [B], into the index
    epoch: Ints  # [B], of the image's source
    share: Ints  # [B], 0 .. canonical_shares - 1; shares cost about the same
    key: Ints  # [B], seed of every draw for the image
    grid_hw: Ints  # [B, 2]
    cost: Ints  # [B]
    downsized: NDArray[np.bool_]  # [B], the image has more patches than its budget


Value = TypeVar("Value")


def _in_force(schedule: Sequence[tuple[int, Value]], step: int, before: Value) -> Value:
    """Return the value of the last entry that has begun, or what holds before the first."""
    return next((value for start, value in reversed(schedule) if start <= step), before)


def attention_tokens(tower: CogViTConfig | TextConfig) -> int:
    """Return n0 of a tower: the length at which attention costs as much as everything else."""
    branches = 3 if tower.mlp == "swiglu" else 2
    # Per token and layer: 8 D^2 + 2 * branches * D * F of matrix products, 4 n D of attention.
    return 2 * tower.embed_dim + branches * tower.mlp_dim // 2


def plan_spec(config: RunConfig) -> PlanSpec:
    """Return the part of a configuration that the plan depends on."""
    data = config.data
    return PlanSpec(
        mixture=data.mixture,
        global_batch_images=data.global_batch_images,
        canonical_shares=data.canonical_shares,
        lookahead_steps=data.lookahead_steps,
        sizing=sizing_of(config),
        attention_tokens=attention_tokens(config.vision),
        batch_schedule=data.batch_schedule,
        budget_schedule=data.budget_schedule,
    )


def plan_hash(index: Index, spec: PlanSpec, seed: int) -> str:
    """Return the hash that names a sequence of global batches."""
    schedules = ("batch_schedule", "budget_schedule")  # runs without them are older than these
    fields = {name: value for name, value in asdict(spec).items() if value or name not in schedules}
    text = json.dumps([VERSION, index.content_hash(), fields, seed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Stream:
    """One source, epoch after epoch. Draw number p of the stream falls into epoch p // S."""

    number: int
    rows: Ints  # [S], into the index
    bounds: Ints | None  # [C + 1]: share c owns rows[bounds[c] : bounds[c + 1]]; None where every share draws from all
    before: Fraction  # share of the mixture before this source, and up to and with it
    upto: Fraction

    def drawn(self, images: int) -> int:
        """Return how many of the run's first images are this source's; with no drift, the sources' sum is exact."""
        before, upto = self.before, self.upto
        return images * upto.numerator // upto.denominator - images * before.numerator // before.denominator

    def drawn_before(self, draws: int, share: int) -> int:
        """Return how many of the first draws fell to the shares before one, 0 .. C."""
        assert self.bounds is not None
        epoch, at = divmod(draws, len(self.rows))
        bound = int(self.bounds[share])  # without a limit: the product passes 2^63 at 3.04e9 samples
        return epoch * bound + bound * at // len(self.rows)

    def drawn_by(self, draws: int, share: int) -> int:
        """Return how many of the first draws fell to a share."""
        return self.drawn_before(draws, share + 1) - self.drawn_before(draws, share)


@dataclass(frozen=True, slots=True)
class _Draws:
    """Samples of a source: row and epoch of each."""

    stream: _Stream
    member: Ints  # into stream.rows
    epoch: Ints


class Planner:
    """The plan of one run. What it keeps between calls could be computed again: it is a pure function that remembers.

    Threads may share it. Errors: DataError for a mixture that names an unknown source or gives one less than a sample a
    window.
    """

    def __init__(self, index: Index, spec: PlanSpec, seed: int) -> None:
        self._index, self._spec, self._seed = index, spec, seed
        self._streams = tuple(_streams(index, spec))
        self._lock = Lock()
        kept = 2 * len(self._streams) * spec.canonical_shares  # an epoch or window and the next one
        self._epoch_windows = lru_cache(kept)(self._epoch_windows_anew)
        self._common_draws = lru_cache(kept)(self._common_draws_anew)
        self._share_window = lru_cache(kept)(self._share_window_anew)

    def batch(self, step: int, shares: Iterable[int] | None = None) -> GlobalBatch:
        """Return some shares of a step's global batch, or all of it.

        Every sample of a source comes exactly once in each of the source's epochs, and each window of lookahead_steps
        holds every source's part of the mixture to within one sample, with no drift.
        """
        spec = self._spec
        shares = range(spec.canonical_shares) if shares is None else shares
        window, inside = divmod(step, spec.lookahead_steps)
        with self._lock:
            found = [self._share_window(window, share)[inside] for share in shares]
        rows, epoch = (np.concatenate(parts) for parts in zip(*found, strict=True))
        sizes, key = self._index.rows[rows], self._keys(rows, epoch)
        sizing = spec.sizing_at(step)
        grid_hw = sizing.grids(sizes["height_px"], sizes["width_px"], key)
        return GlobalBatch(
            step=step,
            rows=rows,
            epoch=epoch,
            share=np.repeat(list(shares), [len(part) for part, _ in found]),
            key=key,
            grid_hw=grid_hw,
            cost=attention_cost(grid_hw.prod(axis=1), spec.attention_tokens),
            downsized=sizing.exceeds(sizes["height_px"], sizes["width_px"], key),
        )

    def _keys(self, rows: Ints, epoch: Ints, *salts: int) -> Ints:
        sample_id = torch.from_numpy(self._index.rows["sample_id"][rows])
        return mix(sample_id, self._seed, torch.from_numpy(epoch), *salts).numpy()

    def _cost(self, rows: Ints, epoch: Ints, sizing: Sizing) -> Ints:
        """Return the cost of images, which in another epoch may have another budget."""
        sizes = self._index.rows[rows]
        grid_hw = sizing.grids(sizes["height_px"], sizes["width_px"], self._keys(rows, epoch))
        return attention_cost(grid_hw.prod(axis=1), self._spec.attention_tokens)

    def _share_window_anew(self, window: int, share: int) -> list[tuple[Ints, Ints]]:
        """Return (rows, epochs) of a share for each step of a window.

        The steps cost in proportion to their images, by the sizing of the window's first step.
        """
        spec = self._spec
        draws, before = [], 0  # slots of the window that belong to the shares before this one
        for stream in self._streams:
            mine, others = self._draws(stream, window, share)
            draws.append(mine)
            before += others
        rows = np.concatenate([one.stream.rows[one.member] for one in draws])
        epoch = np.concatenate([one.epoch for one in draws])
        cost = self._cost(rows, epoch, spec.sizing_at(window * spec.lookahead_steps))
        turns = self._turns(window)[before : before + len(rows)]
        sizes = np.bincount(turns, minlength=spec.lookahead_steps)
        step = spread(cost, sizes, self._keys(rows, epoch, _STEP_SALT))
        return [(rows[step == one], epoch[step == one]) for one in range(spec.lookahead_steps)]

    def _turns(self, window: int) -> Ints:
        """Return the step of each slot of a window: they go round the steps, each of which gets exactly its images."""
        first, steps = window * self._spec.lookahead_steps, np.arange(self._spec.lookahead_steps)
        sizes = np.array([self._spec.batch_images(first + step) for step in steps.tolist()])
        turn = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes.tolist()])
        return np.repeat(steps, sizes)[np.argsort(turn, kind="stable")]

    def _draws(self, stream: _Stream, window: int, share: int) -> tuple[_Draws, int]:
        """Return what a share draws from a source in a window, and how much the shares before it draw."""
        first, last = (stream.drawn(self._spec.images_before(edge)) for edge in (window, window + 1))
        if stream.bounds is None:
            common, owner = self._common_draws(stream.number, window)
            mine = owner == share
            return _Draws(stream, common.member[mine], common.epoch[mine]), int((owner < share).sum())
        start, stop = (stream.drawn_by(draws, share) for draws in (first, last))
        size = int(stream.bounds[share + 1] - stream.bounds[share])
        parts, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for epoch in range(start // size, -(-stop // size)):
            whole = start <= epoch * size and (epoch + 1) * size <= stop
            parts.append(np.arange(size) if whole else self._members(stream, share, epoch, window))
            epochs.append(np.full(len(parts[-1]), epoch))
        member = stream.bounds[share] + np.concatenate(parts)
        return _Draws(stream, member, np.concatenate(epochs)), (
            stream.drawn_before(last, share) - stream.drawn_before(first, share)
        )

    def _members(self, stream: _Stream, share: int, epoch: int, window: int) -> Ints:
        """Return which samples of its stretch a share draws in one window of an epoch."""
        first_window, bounds, order = self._epoch_windows(stream.number, share, epoch)
        start, stop = bounds[window - first_window : window - first_window + 2].tolist()
        return order[start:stop]

    def _epoch_windows_anew(self, number: int, share: int, epoch: int) -> tuple[int, Ints, Ints]:
        """Split a share's epoch into the windows that it meets, which cost in proportion to their sizes.

        Returns the first window, and the bounds of each in the order of samples that comes last.
        """
        stream = self._streams[number]
        assert stream.bounds is not None
        low, high = stream.bounds[share : share + 2].tolist()
        start, stop = epoch * (high - low), (epoch + 1) * (high - low)

        def reached(windows: range) -> Ints:
            return np.array([stream.drawn_by(stream.drawn(self._spec.images_before(one)), share) for one in windows])

        # The mixture's share says where the epoch lies to within a few windows; the counts say where exactly.
        length = len(stream.rows) / (stream.upto - stream.before)  # of an epoch, in images of the run
        first = max(self._spec.window_of(int(epoch * length)) - 2, 0)
        edges = reached(range(first, self._spec.window_of(int((epoch + 1) * length)) + 4))
        skipped = int((edges <= start).sum()) - 1
        bounds = edges[skipped : skipped + 1 + int((edges[skipped + 1 :] < stop).sum()) + 1]
        bounds = np.clip(bounds, start, stop) - start
        rows, epochs = stream.rows[low:high], np.full(high - low, epoch)
        cost = self._cost(rows, epochs, self._spec.sizing_at((first + skipped) * self._spec.lookahead_steps))
        part = spread(cost, np.diff(bounds), self._keys(rows, epochs, _WINDOW_SALT))
        return first + skipped, bounds, np.argsort(part, kind="stable")

    def _common_draws_anew(self, number: int, window: int) -> tuple[_Draws, Ints]:
        """Return what all shares draw in a window from a source that none owns, and the share of each draw."""
        stream, shares = self._streams[number], self._spec.canonical_shares
        first, last = (stream.drawn(self._spec.images_before(edge)) for edge in (window, window + 1))
        epoch, at = np.divmod(np.arange(first, last), len(stream.rows))
        for one in np.unique(epoch).tolist():
            mine = epoch == one
            at[mine] = permute(at[mine], len(stream.rows), "epoch", self._seed, number, one)
        sizes = np.diff(np.arange(shares + 1) * len(at) // shares)
        cost = self._cost(stream.rows[at], epoch, self._spec.sizing_at(window * self._spec.lookahead_steps))
        owner = spread(cost, sizes, self._keys(stream.rows[at], epoch, _WINDOW_SALT))
        return _Draws(stream, at, epoch), owner


def _streams(index: Index, spec: PlanSpec) -> Iterator[_Stream]:
    """Yield the sources of the mixture, or all samples as one."""
    if not spec.mixture:
        yield _stream(index, spec, np.arange(len(index)), 0, Fraction(0), Fraction(1))
        return
    for name, weight in spec.mixture:
        if not 0.0 < weight < float("inf"):
            raise DataError(f"data.mixture gives {name!r} the weight {weight}; weights are positive")
    total = sum((Fraction(weight) for _, weight in spec.mixture), Fraction(0))
    upto = [Fraction(0), *accumulate(Fraction(weight) / total for _, weight in spec.mixture)]
    for number, (name, weight) in enumerate(spec.mixture):
        if name not in index.sources:
            raise DataError(f"data.mixture names {name!r}; the shards' sources are {', '.join(index.sources)}")
        if weight * spec.smallest_window_images < total:
            images = spec.smallest_window_images
            raise DataError(
                f"data.mixture gives {name!r} less than one of the {images} images of a window; raise its weight"
                f" from {weight} or data.lookahead_steps from {spec.lookahead_steps}"
            )
        rows = np.flatnonzero(index.rows["source"] == index.sources.index(name))
        if not len(rows):
            raise DataError(f"data.mixture names {name!r}, which has no usable sample")
        yield _stream(index, spec, rows, number, upto[number], upto[number + 1])


def _stream(index: Index, spec: PlanSpec, rows: Ints, number: int, before: Fraction, upto: Fraction) -> _Stream:
    shares, total = spec.canonical_shares, np.cumsum(_cost_at_all_budgets(index, spec, rows))
    cuts = np.searchsorted(total, total[-1] / shares * np.arange(1, shares))
    bounds = np.array([0, *cuts, len(rows)], np.int64)
    smallest = int(np.diff(bounds).min())
    draws = spec.smallest_window_images * (upto - before) * smallest / len(rows)  # of the smallest share in a window
    owned = shares == 1 or (smallest >= FEWEST_SAMPLES and draws >= FEWEST_DRAWS)
    return _Stream(number, rows, bounds if owned else None, before, upto)


def _cost_at_all_budgets(index: Index, spec: PlanSpec, rows: Ints) -> Ints:
    """Return the sum of what samples cost at each budget of the run: in proportion to what a draw costs on average."""
    sizes, sizing = index.rows[["height_px", "width_px"]][rows], spec.sizing
    in_turn = dict([(0, sizing.budgets), *spec.budget_schedule]).values()
    total = np.zeros(len(rows), np.int64)
    for budget in (one for budgets in in_turn for one in budgets or (sizing.max_patches,)):
        grid_hw = replace(sizing, max_patches=budget).grids(sizes["height_px"], sizes["width_px"])
        total += attention_cost(grid_hw.prod(axis=1), spec.attention_tokens)
    return total
