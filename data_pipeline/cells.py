"""What the samples of a corpus cost, summed over cells of neighbors.

From these sums shares are cut and shards are dealt to blocks without a look at a sample. They are made once for a
selection and a sizing, and stored beside the corpus file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.index import Index
from data_pipeline.stored import stored

Ints = NDArray[np.int64]

VERSION = 1
CELL_IMAGES = 1024
_STARTS = b"cogvit.cells"


@dataclass(frozen=True, eq=False)
class Cells:
    """The used samples of a source, in the order of the corpus: neighbors of one shard, CELL_IMAGES at most."""

    shard: NDArray[np.uint32]  # [M]
    images: Ints  # [M], up to and with a cell
    cost: NDArray[np.float64]  # [M], likewise

    def __len__(self) -> int:
        return len(self.shard)


def open_cells(
    index: Index, sources: Sequence[str | None], costing: str, cost_of: Callable[[NDArray[Any]], Ints]
) -> list[Cells]:
    """Return the cells of some sources; None is all samples as one.

    costing names what cost_of works out: from rows of corpus.ROW, what each costs.
    """
    question = json.dumps([VERSION, index.selection.content, index.corpus.content, list(sources), costing])
    table = stored(index.corpus.path, "cells", question, lambda: _make(index, sources, cost_of))
    shard, images, cost = (table[name].combine_chunks().to_numpy() for name in ("shard", "images", "cost"))
    starts = json.loads(table.schema.metadata[_STARTS])
    slices = [slice(start, stop) for start, stop in pairwise(starts)]
    return [Cells(shard[one], images[one], cost[one]) for one in slices]


def _make(index: Index, sources: Sequence[str | None], cost_of: Callable[[NDArray[Any]], Ints]) -> pa.Table:
    corpus = index.corpus
    found: list[list[tuple[Ints, Ints, NDArray[np.float64]]]] = [[] for _ in sources]
    for shard in range(corpus.num_shards):
        for own, source in zip(found, sources, strict=True):
            rows = index.rows_of_shard(shard, source)
            if len(rows):
                starts = np.arange(0, len(rows), CELL_IMAGES)
                cost = np.add.reduceat(cost_of(corpus.rows_of(shard)[rows - corpus.first[shard]]), starts)
                images = np.diff(np.append(starts, len(rows)))
                own.append((np.full(len(starts), shard), images, cost.astype(np.float64)))
    columns: list[list[NDArray[Any]]] = [[], [], []]
    for own in found:
        parts = [
            np.concatenate([np.zeros(0, kind), *(one[n] for one in own)]) for n, kind in enumerate((int, int, float))
        ]
        for column, values in zip(columns, (parts[0], np.cumsum(parts[1]), np.cumsum(parts[2])), strict=True):
            column.append(values)
    shard_, images_, cost_ = (np.concatenate(column) for column in columns)
    starts_ = [0, *np.cumsum([len(one) for one in columns[0]]).tolist()]
    table = pa.table({"shard": shard_.astype(np.uint32), "images": images_.astype(np.int64), "cost": cost_})
    return table.replace_schema_metadata({_STARTS: json.dumps(starts_)})
