"""What the samples of a corpus cost, summed over cells of neighbors.

From these sums shares are cut and shards are dealt to blocks without a look at a sample. They are made once for a
selection and a sizing, and stored beside the corpus file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.index import Index
from data_pipeline.stored import stored

Ints = NDArray[np.int64]

VERSION = 1
KIND = "cells"
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
    index: Index, sources: Sequence[str | None], costing: str, cost_of: Callable[[Ints], Ints]
) -> list[Cells]:
    """Return the cells of some sources; None is all samples as one.

    costing names what cost_of works out: what each of some rows costs.
    """
    question = cells_question(index, sources, costing)
    table = stored(index.corpus.path, KIND, question, lambda: _make(index, sources, cost_of))
    (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    shard, images, cost = (batch[name].to_numpy() for name in ("shard", "images", "cost"))  # not a copy
    starts = json.loads(table.schema.metadata[_STARTS])
    slices = [slice(start, stop) for start, stop in pairwise(starts)]
    return [Cells(shard[one], images[one], cost[one]) for one in slices]


def cells_question(index: Index, sources: Sequence[str | None], costing: str) -> str:
    """Return what the stored cells of some sources answer."""
    return json.dumps([VERSION, index.selection.content, index.corpus.content, list(sources), costing])


def cells_table(found: Sequence[Cells]) -> pa.Table:
    """Return cells as they are stored."""
    columns = {name: np.concatenate([getattr(one, name) for one in found]) for name in ("shard", "images", "cost")}
    starts = [0, *accumulate(map(len, found))]
    return pa.table(columns).replace_schema_metadata({_STARTS: json.dumps(starts)})


def _make(index: Index, sources: Sequence[str | None], cost_of: Callable[[Ints], Ints]) -> pa.Table:
    corpus = index.corpus
    found: list[list[tuple[int, Ints, Ints]]] = [[] for _ in sources]  # shard, images and costs of its cells
    for shard in range(corpus.num_shards):
        for own, source in zip(found, sources, strict=True):
            rows = index.rows_of_shard(shard, source)
            if len(rows):
                starts = np.arange(0, len(rows), CELL_IMAGES)
                cost = np.add.reduceat(cost_of(rows), starts)
                own.append((shard, np.diff(np.append(starts, len(rows))), cost))
    none: Ints = np.zeros(0, np.int64)
    return cells_table(
        [
            Cells(
                np.repeat([shard for shard, _, _ in own], [len(cost) for _, _, cost in own]).astype(np.uint32),
                np.cumsum(np.concatenate([none, *(images for _, images, _ in own)])),
                np.cumsum(np.concatenate([none, *(cost for _, _, cost in own)]).astype(np.float64)),
            )
            for own in found
        ]
    )
