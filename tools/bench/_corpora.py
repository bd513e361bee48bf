"""Corpora of any size for benchmarks: real rows of a few shards, of which every shard of a long list has one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.cells import KIND, Cells, cells_question, cells_table, open_cells
from data_pipeline.corpus import corpus_place, open_corpus
from data_pipeline.corpus_form import BLOCKS_AT, SHARDS, prelude_bytes, tail_bytes
from data_pipeline.index import Index, checked_at_start
from data_pipeline.measure import Measure
from data_pipeline.merge import Entry, temporary_corpus
from data_pipeline.mixture import cost_at_all_budgets, costing_of
from data_pipeline.select import Choice, select
from data_pipeline.spec import PlanSpec
from data_pipeline.stored import stored
from data_pipeline.table import MORE_COLUMNS, SCHEMA

Ints = NDArray[np.int64]

REAL_SHARDS = 64
MODIFIED_S = 1764453600
Indexed = tuple[Entry, pa.Table, dict[str, Any]]


def index_table(height_px: Ints, width_px: Ints, first: int, captions: int = 0) -> pa.Table:
    """Return what an index says of images of some sizes, numbered from first, with so many English captions each."""
    count = len(height_px)
    columns = {name: np.zeros(count, np.int64) for name in SCHEMA.names}
    numbers = np.arange(first, first + count)
    columns |= {"sample_id": numbers, "content_hash": numbers, "height_px": height_px, "width_px": width_px}
    columns["caption_member"] -= captions == 0
    columns["label"] -= 1
    ends = pa.array(np.arange(count + 1, dtype=np.int32) * captions)
    lists = {
        "en_bytes": pa.ListArray.from_arrays(ends, pa.array(np.full(count * captions, 60, np.int32))),
        "zh_bytes": pa.array([[]] * count, pa.list_(pa.int32())),
    } | {f"more_{name}": pa.array([[]] * count, pa.list_(pa.int64())) for name in MORE_COLUMNS}
    texts = {"key": numbers.astype(str), "source": np.full(count, "web"), "format": np.full(count, "jpeg")}
    whole = {name: pa.array(columns[name]) for name in SCHEMA.names} | lists
    return pa.table(whole | {name: pa.array(text) for name, text in texts.items()}).select(SCHEMA.names).cast(SCHEMA)


def indexed(height_px: Ints, width_px: Ints, images_a_shard: int, captions: int = 0) -> Iterator[Indexed]:
    """Yield shards of images of some sizes, as their indexes say."""
    for start in range(0, len(height_px), images_a_shard):
        part = slice(start, start + images_a_shard)
        facts = {"version": {"size_bytes": 0, "mark": ""}}
        yield Entry(f"{start // images_a_shard:07d}.tar", 0), index_table(height_px[part], width_px[part], start), facts


def write_long_corpus(directory: Path, num_shards: int, images_a_shard: int, spec: PlanSpec) -> str:
    """Write a corpus file of many shards, and the costs of its samples for a plan; returns the pattern.

    Every line of its list is a shard's own; the rows that it points to are those of one of REAL_SHARDS.
    """
    place = corpus_place(pattern := f"{directory}/*.tar")
    real = min(REAL_SHARDS, num_shards)
    sizes_px = np.random.default_rng(0).integers(200, 1200, (2, real * images_a_shard))
    few = temporary_corpus("", indexed(sizes_px[0], sizes_px[1], images_a_shard))
    which = np.arange(num_shards) % real
    columns = {name: few.shards[name].take(pa.array(which)) for name in SHARDS.names}
    columns["name"] = pa.array([f"{number:07d}.tar" for number in range(num_shards)])
    columns["mark"] = pa.array([f"{MODIFIED_S}.0"] * num_shards)
    for number in checked_at_start(num_shards):  # the only ones that need be there
        path = directory / f"{number:07d}.tar"
        path.touch()
        os.utime(path, (MODIFIED_S, MODIFIED_S))
    content = f"{num_shards} shards of {images_a_shard}"
    tail = tail_bytes(pa.table(columns).cast(SHARDS), ["web"], ["jpeg"], content, None)
    end = int(few.block[-1]) * few.mapped.itemsize + len(few.block_bytes(real - 1))
    with open(place.path, "wb") as file:
        file.seek(BLOCKS_AT)
        file.write(few.buffer[BLOCKS_AT:end])
        file.seek(offset := -(-end // 64) * 64)
        file.write(tail)
        file.seek(0)
        file.write(prelude_bytes(offset, tail))
    index = Index(few, select(few, Choice()))
    (cells,) = open_cells(index, [None], "", lambda rows: cost_at_all_budgets(rows, Measure(index, spec)))
    corpus = open_corpus(place)
    question = cells_question(Index(corpus, select(corpus, Choice())), [None], costing_of(spec))
    stored(place.path, KIND, question, lambda: cells_table([_repeated(cells, which)]))
    return pattern


def _repeated(cells: Cells, which: Ints) -> Cells:
    """Return the cells of a corpus whose shards are some of those of another one."""
    images, cost = np.diff(cells.images, prepend=0), np.diff(cells.cost, prepend=0)
    owned = np.bincount(cells.shard)
    first = np.cumsum(owned) - owned
    inside = np.arange(owned[which].sum()) - np.repeat(np.cumsum(owned[which]) - owned[which], owned[which])
    at = np.repeat(first[which], owned[which]) + inside
    shard = np.repeat(np.arange(len(which)), owned[which]).astype(np.uint32)
    return Cells(shard, np.cumsum(images[at]), np.cumsum(cost[at]))
