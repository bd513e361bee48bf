"""The shards of a run as a feature store has them: each under a hash of the images whose features it holds.

The hashes of a corpus are worked out once and stored beside it, where every rank maps them; what a rank does at its
start does not grow with the corpus.
"""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cogvit.config import RunConfig
from cogvit.errors import ConfigError
from cogvit.teacher.store import contents_of
from data_pipeline.index import Index, open_index
from data_pipeline.sizing import Sizing, sizing_of
from data_pipeline.stored import stored

Ints = NDArray[np.int64]

_VERSION = 1


class StoredShards(Mapping[str, str]):
    """The contents of the shards of an index that have images, by their paths."""

    def __init__(self, index: Index, sizing: Sizing) -> None:
        self.index, self._sizing = index, sizing
        corpus = index.corpus
        question = json.dumps([_VERSION, corpus.identity(), index.content_hash(), asdict(sizing)])
        self._contents = stored(corpus.path, "contents", question, self._make)["contents"]

    def __getitem__(self, path: str) -> str:
        contents = None if (number := self.index.corpus.number(path)) is None else self.contents(number)
        if contents is None:
            raise KeyError(path)
        return contents

    def __iter__(self) -> Iterator[str]:
        return (self.index.corpus.shard_path(number) for number in self.numbers())

    def items(self) -> ItemsView[str, str]:
        """Return paths and contents, which are not looked up path by path."""
        return _Pairs(self)

    def __len__(self) -> int:
        return len(self._contents) - self._contents.null_count

    def numbers(self, part: tuple[int, int] = (0, 1)) -> Iterator[int]:
        """Yield the numbers of the shards that have images; part: of so many parts of equal numbers, this one's."""
        number, parts = part
        return (one for one in range(number, len(self._contents), parts) if self._contents[one].is_valid)

    def contents(self, number: int) -> str | None:
        """Return the contents of a shard; None where it has no images."""
        value: bytes | None = self._contents[number].as_py()
        return None if value is None else value.hex()

    def rows(self, number: int) -> Ints:
        """Return the rows of a shard's images, in their order."""
        return self.index.rows_of_shard(number)

    def grids(self, rows: Ints) -> Ints:
        """Return the grids of some rows, [len(rows), 2]."""
        entries = self.index.take(rows)
        return self._sizing.grids(entries["height_px"], entries["width_px"])

    def _make(self) -> pa.Table:
        corpus, every = self.index.corpus, []
        for number in range(corpus.num_shards):
            rows = self.rows(number)
            hashes = corpus.hashes(number)["content_hash"][rows - corpus.first[number]]
            found = contents_of(self.index.take(rows)["sample_id"], hashes, self.grids(rows)) if len(rows) else None
            every.append(None if found is None else bytes.fromhex(found))
        return pa.table({"contents": pa.array(every, pa.binary(32))})


class _Pairs(ItemsView[str, str]):
    def __init__(self, shards: StoredShards) -> None:
        super().__init__(shards)
        self._shards = shards

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for number in self._shards.numbers():
            yield self._shards.index.corpus.shard_path(number), self._shards.contents(number) or ""


def stored_sets(config: RunConfig, *, evaluates: bool) -> list[StoredShards]:
    """Return the shards of a run's training set and, where it evaluates on others, of those.

    A part of the training shards that is held out is stored with the rest: both are of one file a shard.
    """
    data = config.data
    patterns = [data.shards] + ([data.eval_shards] if evaluates and data.eval_shards else [])
    sizing = sizing_of(config)
    return [StoredShards(open_index(data, pattern).having("image"), sizing) for pattern in patterns]


def check_sets(sets: Sequence[StoredShards]) -> None:
    """Check that a shard of two sets has the same images in each.

    Errors: ConfigError for one that has not, as dropped duplicates leave: its name would stand for two files.
    """
    for second, first in zip(sets[1:], sets, strict=False):
        ours, theirs = (pa.array(list(one)) for one in (second, first))
        for path in ours.filter(pc.is_in(ours, theirs)).to_pylist():
            if first[path] != second[path]:
                raise ConfigError(
                    f"{path} is in --data.shards and --data.eval-shards with other images in each; pass"
                    " --data.duplicates keep, or hold out other shards"
                )
