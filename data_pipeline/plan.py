"""The plan: which samples make the global batch of a step, a pure function of the index, a spec, a seed and the step.

It knows nothing of ranks, so the sequence of global batches is the same on any number of them, and a step can be
replayed anywhere. The samples of a source belong to C canonical shares: stretches of neighbors that cost the same.
Every share walks through its own stretch, epoch after epoch and block by block (`order.py`); whoever trains on a share
plans it alone and reads nothing of the others. A window of some steps takes its exact part of every source; inside a
block the windows of a share, and inside a window its steps, cost the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import mix
from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from data_pipeline.balance import spread
from data_pipeline.index import Index
from data_pipeline.measure import Measure
from data_pipeline.mixture import open_streams
from data_pipeline.order import Blocks, Stream, blocks_of, rows_of_block
from data_pipeline.permutation import permute
from data_pipeline.sizing import Sizing
from data_pipeline.spec import PlanSpec
from data_pipeline.token_counts import TokenCounts
from data_pipeline.topology import Span

Ints = NDArray[np.int64]

VERSION = 4  # of the sequence: the same spec gives other batches in another version
BLOCK_WINDOWS = 16  # that a block of a share lasts for at least
FEWEST_BLOCK_IMAGES = 1 << 15
_WINDOW_SALT = 0x77696E64  # "wind"
_STEP_SALT = 0x73746570  # "step"
_SPAN_SALT = 0x7370616E  # "span"


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The images of some shares of one optimizer step, share by share; B of them where the shares are all."""

    step: int
    rows: Ints  # [B], into the index
    epoch: Ints  # [B], of the image's source
    share: Ints  # [B], 0 .. canonical_shares - 1; shares cost about the same
    key: Ints  # [B], seed of every draw for the image
    grid_hw: Ints  # [B, 2], of its first image
    patches: Ints  # [B], of all images
    images: Ints  # [B]
    tokens: Ints  # [B], of the language model at most; 0 where there is none
    phases: Ints  # [B, 2], what vision tower and language model cost
    downsized: Ints  # [B], images that have more patches than their budget

    @property
    def cost(self) -> Ints:
        """What each sample costs, [B]."""
        return self.phases.sum(axis=1)

    def within(self, span: Span) -> GlobalBatch:
        """Return the images of a span: where groups meet inside a share, its images are divided in parts of equal cost.

        Whoever divides a share gets the same parts.
        """
        mine = np.ones(len(self.rows), np.bool_)
        key = mix(torch.from_numpy(self.key), _SPAN_SALT).numpy()
        for share in np.unique(self.share).tolist():
            cuts = [cut for cut in span.cuts if share < cut < share + 1]
            here = np.flatnonzero(self.share == share)
            ends = np.array([float(cut - share) for cut in (*cuts, share + 1)])
            sizes = np.diff(np.rint(ends * len(here)).astype(np.int64), prepend=0)
            cost = self.cost[here]
            part = spread(cost, sizes, key[here], np.diff(ends, prepend=0.0) * cost.sum())
            mine[here] = np.array([span.begin <= begin < span.end for begin in (share, *cuts)])[part]
        names = (field.name for field in fields(self) if field.name != "step")
        return replace(self, **{name: getattr(self, name)[mine] for name in names})


def plan_hash(index: Index, spec: PlanSpec, seed: int) -> str:
    """Return the hash that names a sequence of global batches."""
    # Runs without them are older than these.
    newer = ("batch_schedule", "budget_schedule", "language")
    said = {name: value for name, value in asdict(spec).items() if value or name not in newer}
    if spec.language is not None and not spec.language.framed:
        del said["language"]["framed"]
    if spec.language is not None and not spec.language.sharp_cost:
        del said["language"]["sharp_cost"]
    if not spec.sizing.min_patches:
        del said["sizing"]["min_patches"]
    if spec.language is not None and spec.language.video == VideoConfig():
        del said["language"]["video"]
    text = json.dumps([VERSION, index.content_hash(), said, seed], sort_keys=True)
    return f"{VERSION}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def check_plan(checkpoint: str, own: str) -> None:
    """Compare the hash of a checkpoint's plan with that of a run. Errors: DataError says what to do."""
    if checkpoint == own:
        return
    if not checkpoint.startswith(f"{VERSION}-"):
        raise DataError(
            f"the checkpoint's data plan {checkpoint} has the order of an older version, and this program's is"
            f" {VERSION}; finish that run with the version that began it, or go on from its weights: --init RUN and"
            " another --out"
        )
    raise DataError(
        f"the checkpoint's data plan {checkpoint} is not this run's {own}: shards, mixture, batch size, sizing or seed"
        " changed; restore them or start a new run in another --out"
    )


@dataclass(frozen=True, slots=True)
class _Draws:
    """Samples of a source."""

    rows: Ints
    epoch: Ints


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a share, dealt to the windows that it meets."""

    first_window: int
    bounds: Ints  # of each window's rows
    rows: Ints

    def of_window(self, window: int) -> Ints:
        """Return what a window draws of it."""
        start, stop = self.bounds[window - self.first_window : window - self.first_window + 2].tolist()
        return self.rows[start:stop]


Value = TypeVar("Value")


class _Latest(Generic[Value]):
    """Remembers the latest two values of each kind: what a share walks through and what comes next."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], dict[tuple[int, ...], Value]] = {}

    def get(self, kind: tuple[int, ...], name: tuple[int, ...], make: Callable[[], Value]) -> Value:
        """Return what is remembered, or make it."""
        found = self._found.setdefault(kind, {})
        value = found.pop(name) if name in found else make()
        found[name] = value
        if len(found) > 2:
            del found[next(iter(found))]
        return value


class Planner:
    """The plan of one run. What it keeps between calls could be computed again: it is a pure function that remembers.

    Threads may share it. Errors: DataError for a mixture that names an unknown source or gives one less than a sample a
    window.
    """

    def __init__(self, index: Index, spec: PlanSpec, seed: int, counts: TokenCounts | None = None) -> None:
        self._index, self._spec, self._seed = index, spec, seed
        self._measure = Measure(index, spec, counts)
        self._streams = tuple(open_streams(self._measure))
        self._lock = Lock()
        self._windows = _Latest[list[tuple[Ints, Ints]]]()
        self._orders = _Latest[Blocks]()
        self._blocks = _Latest[_Block]()
        self._common = _Latest[tuple[_Draws, Ints]]()
        self._uneven_turns = lru_cache(2)(self._turns_anew)

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
        key = self._keys(self._index.take(rows), epoch)
        measured = self._measure.of(rows, key, spec.sizing_at(step))
        return GlobalBatch(
            step=step,
            rows=rows,
            epoch=epoch,
            share=np.repeat(list(shares), [len(part) for part, _ in found]),
            key=key,
            grid_hw=measured.grid_hw,
            patches=measured.patches,
            images=measured.images,
            tokens=measured.tokens,
            phases=measured.phases,
            downsized=measured.downsized,
        )

    def sizing_at(self, step: int) -> Sizing:
        """Return how the images of a step are sized."""
        return self._spec.sizing_at(step)

    def _keys(self, entries: NDArray[Any], epoch: Ints, *salts: int) -> Ints:
        sample_id = torch.from_numpy(entries["sample_id"].copy())
        return mix(sample_id, self._seed, torch.from_numpy(epoch), *salts).numpy()

    def _cost(self, rows: Ints, entries: NDArray[Any], epoch: Ints, sizing: Sizing) -> Ints:
        """Return the cost of samples, which in another epoch may have another budget or caption."""
        return self._measure.of(rows, self._keys(entries, epoch), sizing).phases.sum(axis=1)

    def _share_window(self, window: int, share: int) -> list[tuple[Ints, Ints]]:
        return self._windows.get((share,), (window,), lambda: self._share_window_anew(window, share))

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
        rows = np.concatenate([one.rows for one in draws])
        epoch = np.concatenate([one.epoch for one in draws])
        entries = self._index.take(rows)
        cost = self._cost(rows, entries, epoch, spec.sizing_at(window * spec.lookahead_steps))
        turns = self._turns(window, before, len(rows))
        sizes = np.bincount(turns, minlength=spec.lookahead_steps)
        step = spread(cost, sizes, self._keys(entries, epoch, _STEP_SALT))
        return [(rows[step == one], epoch[step == one]) for one in range(spec.lookahead_steps)]

    def _turns(self, window: int, start: int, count: int) -> Ints:
        """Return the step of some slots of a window: they go round the steps, each of which gets its exact images."""
        first, steps = window * self._spec.lookahead_steps, self._spec.lookahead_steps
        sizes = tuple(self._spec.batch_images(first + step) for step in range(steps))
        if len(set(sizes)) == 1:
            return (start + np.arange(count)) % steps
        return self._uneven_turns(sizes)[start : start + count]

    @staticmethod
    def _turns_anew(sizes: tuple[int, ...]) -> Ints:
        turn = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        return np.repeat(np.arange(len(sizes)), sizes)[np.argsort(turn, kind="stable")]

    def _draws(self, stream: Stream, window: int, share: int) -> tuple[_Draws, int]:
        """Return what a share draws from a source in a window, and how much the shares before it draw."""
        first, last = (stream.drawn(self._spec.images_before(edge)) for edge in (window, window + 1))
        if stream.bounds is None:
            common, owner = self._common.get(
                (stream.number,), (window,), lambda: self._common_draws_anew(stream, window)
            )
            mine = owner == share
            return _Draws(common.rows[mine], common.epoch[mine]), int((owner < share).sum())
        start, stop = (stream.drawn_by(draws, share) for draws in (first, last))
        size, position = stream.size_of(share), start
        parts, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while position < stop:
            epoch, at = divmod(position, size)
            blocks = self._blocks_of(stream, share, epoch)
            block = int(np.searchsorted(blocks.bounds, at, "right")) - 1
            begin, end = (epoch * size + int(edge) for edge in blocks.bounds[block : block + 2])
            if start <= begin and end <= stop:
                parts.append(rows_of_block(stream, blocks, block))
            else:
                parts.append(self._dealt(stream, share, epoch, block).of_window(window))
            epochs.append(np.full(len(parts[-1]), epoch))
            position = min(stop, end)
        others = stream.drawn_before(last, share) - stream.drawn_before(first, share)
        return _Draws(np.concatenate(parts), np.concatenate(epochs)), others

    def _blocks_of(self, stream: Stream, share: int, epoch: int) -> Blocks:
        assert stream.bounds is not None
        a_window = self._spec.smallest_window_images * (stream.upto - stream.before) / self._spec.canonical_shares
        images = max(int(BLOCK_WINDOWS * a_window), FEWEST_BLOCK_IMAGES)
        return self._orders.get(
            (stream.number, share), (epoch,), lambda: blocks_of(stream, share, epoch, self._seed, images)
        )

    def _dealt(self, stream: Stream, share: int, epoch: int, block: int) -> _Block:
        return self._blocks.get(
            (stream.number, share), (epoch, block), lambda: self._dealt_anew(stream, share, epoch, block)
        )

    def _dealt_anew(self, stream: Stream, share: int, epoch: int, block: int) -> _Block:
        """Split a block of a share into the windows that it meets, which cost in proportion to their sizes."""
        blocks = self._blocks_of(stream, share, epoch)
        begin = epoch * stream.size_of(share)
        start, stop = (begin + int(edge) for edge in blocks.bounds[block : block + 2])

        def reached(window: int) -> int:
            return stream.drawn_by(stream.drawn(self._spec.images_before(window)), share)

        first, beyond = 0, 1
        while reached(beyond) <= start:
            first, beyond = beyond, 2 * beyond
        while beyond - first > 1:
            middle = (first + beyond) // 2
            first, beyond = (middle, beyond) if reached(middle) <= start else (first, middle)
        edges = [start]
        while edges[-1] < stop:
            edges.append(reached(first + len(edges)))
        bounds = np.clip(np.array(edges, np.int64), start, stop) - start
        rows = rows_of_block(stream, blocks, block)
        entries, epochs = self._index.take(rows), np.full(len(rows), epoch)
        cost = self._cost(rows, entries, epochs, self._spec.sizing_at(first * self._spec.lookahead_steps))
        part = spread(cost, np.diff(bounds), self._keys(entries, epochs, _WINDOW_SALT))
        return _Block(first, bounds, rows[np.argsort(part, kind="stable")])

    def _common_draws_anew(self, stream: Stream, window: int) -> tuple[_Draws, Ints]:
        """Return what all shares draw in a window from a source that none owns, and the share of each draw."""
        shares = self._spec.canonical_shares
        first, last = (stream.drawn(self._spec.images_before(edge)) for edge in (window, window + 1))
        epoch, at = np.divmod(np.arange(first, last), len(stream))
        for one in np.unique(epoch).tolist():
            mine = epoch == one
            at[mine] = permute(at[mine], len(stream), "epoch", self._seed, stream.number, one)
        sizes = np.diff(np.arange(shares + 1) * len(at) // shares)
        rows = stream.rows_at(at)
        entries = self._index.take(rows)
        cost = self._cost(rows, entries, epoch, self._spec.sizing_at(window * self._spec.lookahead_steps))
        owner = spread(cost, sizes, self._keys(entries, epoch, _WINDOW_SALT))
        return _Draws(rows, epoch), owner
