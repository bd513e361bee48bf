"""The index: where every sample lies, how large it is and how long its captions are, known before any pixel is decoded.

`build_index` reads each shard once and writes SHARD.parquet; `load_index` joins those files into the columns that plan,
placement and loading work on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cogvit.batch import SampleRef
from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from data_pipeline.caption import LANGUAGES, CaptionChoice, Captions, captions_of, parse_captions, parse_metadata
from data_pipeline.decode import image_size_px
from data_pipeline.shards import Member, ShardStat, expand_shards, is_remote, read_members, retry, stat_shard

VERSION = 1
IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
CAPTION_EXTENSIONS = ("json", "txt")  # in the order in which captions are looked for
DEFAULT_SOURCE = "default"
_METADATA_KEY = b"cogvit.index"
_LOAD_THREADS = 8

# One row per sample; its key and the lengths of its captions lie beside it.
ROW = np.dtype(
    [
        ("sample_id", np.int64),
        ("content_hash", np.int64),  # of the encoded image
        ("offset_bytes", np.int64),
        ("size_bytes", np.int64),
        ("height_px", np.int32),  # upright
        ("width_px", np.int32),
        ("caption_offset_bytes", np.int64),
        ("caption_size_bytes", np.int32),
        ("caption_member", np.int8),  # index into CAPTION_EXTENSIONS; -1 where there is no caption
        ("num_captions", np.int64, (len(LANGUAGES),)),
        ("caption_start", np.int64, (len(LANGUAGES),)),  # of its entries in Index.caption_bytes[language]
        ("shard", np.int32),
        ("source", np.int32),
    ]
)
_STORED = tuple(name for name in ROW.names or () if name not in ("num_captions", "caption_start", "shard", "source"))
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        *((name, pa.from_numpy_dtype(ROW[name])) for name in _STORED),
        *((f"{language}_bytes", pa.list_(pa.int32())) for language in LANGUAGES),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What indexing one shard gave."""

    shard: str
    num_images: int
    problems: dict[str, int]  # reason -> how many members or samples it cost
    reused: bool  # its index was there and fits


@dataclass(frozen=True)
class Index:
    """The samples of a set of shards, in shard and tar order."""

    shards: tuple[str, ...]
    sources: tuple[str, ...]
    keys: pa.ChunkedArray  # of strings
    rows: NDArray[Any]  # [S] of ROW
    caption_bytes: tuple[NDArray[np.int32], ...]  # per language: UTF-8 lengths of all captions, end to end

    def __len__(self) -> int:
        return len(self.rows)

    def ref(self, row: int) -> SampleRef:
        """Return where the image of a sample lies."""
        sample_id, offset, size, shard = self.rows[["sample_id", "offset_bytes", "size_bytes", "shard"]][row].tolist()
        return SampleRef(sample_id, self.shards[shard], offset, size)

    def name(self, row: int) -> str:
        """Return shard and key of a sample, for messages."""
        return f"{self.shards[self.rows['shard'][row]]}:{self.keys[row].as_py()}"

    def select(self, chosen: NDArray[np.bool_]) -> Index:
        """Return the index of the chosen samples alone."""
        return replace(self, keys=self.keys.filter(pa.array(chosen)), rows=self.rows[chosen])

    def captioned(self) -> Index:
        """Return the index of the samples that have a caption."""
        return self.select(self.rows["caption_member"] >= 0)

    def chosen_bytes(self, rows: NDArray[np.int64], choice: CaptionChoice) -> NDArray[np.int64]:
        """Return the UTF-8 length of the chosen caption of each of some rows, all of which have one."""
        sizes = np.zeros(len(rows), np.int64)
        for language, lengths in enumerate(self.caption_bytes):
            here = choice.language == language
            sizes[here] = lengths[self.rows["caption_start"][rows[here], language] + choice.number[here]]
        return sizes

    def content_hash(self) -> str:
        """Return a hash of everything that plan and placement depend on; moving or renaming directories keeps it."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("sample_id", "content_hash", "height_px", "width_px", "source", "num_captions"):
            digest.update(np.ascontiguousarray(self.rows[name]))
        for lengths in self.caption_bytes:
            digest.update(lengths)
        digest.update("/".join(self.sources).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return one line: images, shards, sources and captions."""
        counts = np.bincount(self.rows["source"], minlength=len(self.sources))
        sources = ", ".join(f"{name} {count:,}" for name, count in zip(self.sources, counts, strict=True))
        captions = ", ".join(
            f"{language} {count:,}" for language, count in zip(LANGUAGES, self.rows["num_captions"].sum(0), strict=True)
        )
        return f"{len(self):,} images in {len(self.shards):,} shards; sources: {sources}; captions: {captions}"


def index_path(shard: str, index_dir: str = "") -> str:
    """Return where the index of a shard lies: SHARD.parquet beside it, or in index_dir."""
    directory, _, name = shard.rpartition("/")
    return f"{index_dir.rstrip('/') if index_dir else directory}/{name}.parquet"


def build_index(pattern: str, index_dir: str = "", source: str = DEFAULT_SOURCE) -> Iterator[ShardReport]:
    """Index the shards of a pattern one by one; a shard whose index fits is left alone.

    source names the samples whose json names none. Errors: DataError for a pattern without shards, two shards of one
    name in an index_dir, or a shard that is not a sound tar.
    """
    shards = expand_shards(pattern)
    paths = [index_path(shard, index_dir) for shard in shards]
    if len(set(paths)) != len(paths):
        raise DataError(f"--index-dir {index_dir}: shards of {pattern!r} share a file name; index each directory apart")
    for shard, path in zip(shards, paths, strict=True):
        stat = stat_shard(shard)
        facts = {"version": VERSION, "default_source": source, **asdict(stat)}
        stored = _read_facts(path)
        if stored is not None and {**stored, "problems": None, "num_images": None} == {
            **facts,
            "problems": None,
            "num_images": None,
        }:
            yield ShardReport(shard, stored["num_images"], stored["problems"], reused=True)
            continue
        problems: Counter[str] = Counter()
        table = _read_shard(shard, source, problems)
        facts |= {"num_images": table.num_rows, "problems": dict(problems)}
        _write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts)}), path)
        yield ShardReport(shard, table.num_rows, dict(problems), reused=False)
