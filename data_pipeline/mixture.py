"""The sources of a plan: each with its part of the mixture, and cut into shares of equal cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cogvit.errors import DataError
from data_pipeline.cells import open_cells
from data_pipeline.measure import Measure
from data_pipeline.order import Stream, cut_shares
from data_pipeline.spec import PlanSpec

Ints = NDArray[np.int64]

FEWEST_SAMPLES = 64  # of a source in each share; a smaller source belongs to all shares
FEWEST_DRAWS = 4  # of a source in each share and window; likewise (at 2 or less, rounding could ask for less than none)
_NAMES_TOLD = 20


def open_streams(measure: Measure) -> Iterator[Stream]:
    """Yield the sources of the mixture, or all samples as one.

    Errors: DataError for an unknown source, or one with less than a sample a window.
    """
    index, spec = measure.index, measure.spec
    for name, weight in spec.mixture:
        if not 0.0 < weight < float("inf"):
            raise DataError(f"data.mixture gives {name!r} the weight {weight}; weights are positive")
    known = dict(index.selection.by_source)
    for name, _ in spec.mixture:
        if name not in known:
            raise DataError(f"data.mixture names {name!r}; the shards' sources are {_told(index.sources)}")
    total = sum((Fraction(weight) for _, weight in spec.mixture), Fraction(0))
    for name, weight in spec.mixture:
        if weight * spec.smallest_window_images < total:
            images = spec.smallest_window_images
            raise DataError(
                f"data.mixture gives {name!r} less than one of the {images} images of a window; raise its weight"
                f" from {weight} or data.lookahead_steps from {spec.lookahead_steps}"
            )
    names: list[str | None] = [name for name, _ in spec.mixture] or [None]
    upto = [Fraction(0), *accumulate(Fraction(weight) / total for _, weight in spec.mixture)]
    upto = upto if spec.mixture else [Fraction(0), Fraction(1)]
    found = open_cells(index, names, costing_of(spec), lambda rows: cost_at_all_budgets(rows, measure))
    for number, (source, cells) in enumerate(zip(names, found, strict=True)):
        yield _stream(measure, Stream(number, source, index, cells, None, upto[number], upto[number + 1]))


def costing_of(spec: PlanSpec) -> str:
    """Return what `cost_at_all_budgets` depends on."""
    told = [asdict(spec.sizing), spec.budget_schedule, spec.attention_tokens]
    return json.dumps(told if spec.language is None else [*told, asdict(spec.language)])


def _told(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more:,} more" if more > 0 else "")


def _stream(measure: Measure, stream: Stream) -> Stream:
    """Return a source with the stretches of the shares, where it is large enough for them."""

    def costs_of(position: Ints) -> NDArray[np.float64]:
        return cost_at_all_budgets(stream.rows_at(position), measure).astype(np.float64)

    spec = measure.spec
    shares = spec.canonical_shares
    if shares > 1 and len(stream) < shares * FEWEST_SAMPLES:
        return stream
    bounds = cut_shares(stream.cells, shares, costs_of)
    smallest = int(np.diff(bounds).min())
    weight = stream.upto - stream.before
    draws = spec.smallest_window_images * weight * smallest / max(len(stream), 1)  # of the smallest share in a window
    owned = shares == 1 or (smallest >= FEWEST_SAMPLES and draws >= FEWEST_DRAWS)
    return replace(stream, bounds=bounds) if owned else stream


def cost_at_all_budgets(rows: Ints, measure: Measure) -> Ints:
    """Return the sum of what samples cost at each budget of the run: in proportion to what a draw costs on average."""
    spec = measure.spec
    in_turn = dict([(0, spec.sizing.budgets), *spec.budget_schedule]).values()
    total = np.zeros(len(rows), np.int64)
    key = measure.index.take(rows)["sample_id"].copy()
    for budget in (one for budgets in in_turn for one in budgets or (spec.sizing.max_patches,)):
        sizing = replace(spec.sizing, max_patches=budget, budgets=())
        total += measure.of(rows, key, sizing).phases.sum(axis=1)
    return total
