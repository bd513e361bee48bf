"""The index: where every sample lies, how large it is and how long its captions are, known before any pixel is decoded.

`build_index` reads each shard once and writes SHARD.parquet; `load_index` joins those files into the columns that plan,
placement and loading work on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cogvit.batch import SampleRef, ShardVersion
from cogvit.config import DataConfig
from cogvit.errors import ConfigError, DataError
from data_pipeline.caption import LANGUAGES, CaptionChoice
from data_pipeline.rules import Rules, read_rule
from data_pipeline.scan import scan_shard
from data_pipeline.shards import expand_shards, stat_shard, whole_shard
from data_pipeline.table import ROW, STORED, VERSION, index_path, read_table, table_exists, write_table

DEFAULT_SOURCE = "default"
RULE_COLUMNS = ("key", "source", "format", "height_px", "width_px", "size_bytes", "captions_en", "captions_zh")
_LOAD_THREADS = 8
_SOURCES_TOLD = 20  # a json may call anything a source, as the page that an image is from


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What indexing one shard gave."""

    shard: str
    num_images: int
    problems: dict[str, int]  # reason -> how many members or samples it cost
    reused: bool  # its index was there and fits
    failure: str = ""  # why there is no index


@dataclass(frozen=True)
class Index:
    """The samples of a set of shards, in shard and tar order."""

    shards: tuple[str, ...]
    versions: tuple[ShardVersion, ...]  # that were indexed
    sources: tuple[str, ...]
    keys: pa.ChunkedArray  # of strings
    rows: NDArray[Any]  # [S] of ROW
    caption_bytes: tuple[NDArray[np.int32], ...]  # per language: UTF-8 lengths of all captions, end to end
    left_out: dict[str, int] = field(default_factory=dict)  # by load_index: reason -> how many

    def __len__(self) -> int:
        return len(self.rows)

    def ref(self, row: int) -> SampleRef:
        """Return where the image of a sample lies."""
        sample_id, offset, size, shard = self.rows[["sample_id", "offset_bytes", "size_bytes", "shard"]][row].tolist()
        return SampleRef(sample_id, self.shards[shard], offset, size, self.versions[shard])

    def name(self, row: int) -> str:
        """Return shard and key of a sample, for messages."""
        return f"{self.shards[self.rows['shard'][row]]}:{self.keys[row].as_py()}"

    def select(self, chosen: NDArray[np.bool_]) -> Index:
        """Return the index of the chosen samples alone."""
        return replace(self, keys=self.keys.filter(pa.array(chosen)), rows=self.rows[chosen])

    def captioned(self) -> Index:
        """Return the index of the samples that have a caption; the others are counted as left out."""
        captioned = self.select(self.rows["caption_member"] >= 0)
        missing = len(self) - len(captioned)
        return replace(captioned, left_out=self.left_out | {"no caption": missing}) if missing else self

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
            digest.update(self.rows[name].tobytes())
        for lengths in self.caption_bytes:
            digest.update(lengths.tobytes())
        digest.update("/".join(self.sources).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return one line: images, shards, sources and captions."""
        counts = np.bincount(self.rows["source"], minlength=len(self.sources))
        told = np.sort(np.argsort(-counts, kind="stable")[:_SOURCES_TOLD]).tolist()
        sources = ", ".join(f"{self.sources[number]} {counts[number]:,}" for number in told)
        sources += f" and {len(counts) - len(told):,} more" if len(told) < len(counts) else ""
        captions = ", ".join(
            f"{language} {count:,}" for language, count in zip(LANGUAGES, self.rows["num_captions"].sum(0), strict=True)
        )
        left_out = "".join(f"; left out: {count:,} x {reason}" for reason, count in self.left_out.items())
        return (
            f"{len(self):,} images in {len(self.shards):,} shards; sources: {sources}; captions: {captions}{left_out}"
        )


def build_index(
    pattern: str, index_dir: str = "", source: str = DEFAULT_SOURCE, rules: Rules | None = None
) -> Iterator[ShardReport]:
    """Index the shards of a pattern one by one; a shard whose index fits is left alone.

    source names the samples whose json names none. Errors: DataError as `shards_to_index` and `index_shard`.
    """
    for shard in shards_to_index(pattern, index_dir):
        yield index_shard(shard, index_dir, source, rules or Rules())


def shards_to_index(pattern: str, index_dir: str) -> tuple[str, ...]:
    """Return the shards of a pattern.

    Errors: DataError for a pattern without shards, or two shards of one name in an index_dir.
    """
    shards = expand_shards(pattern)
    if len({index_path(shard, index_dir) for shard in shards}) != len(shards):
        raise DataError(f"--index-dir {index_dir}: shards of {pattern!r} share a file name; index each directory apart")
    return shards


def index_shard(shard: str, index_dir: str, source: str, rules: Rules) -> ShardReport:
    """Index one shard, unless its index fits. Errors: DataError when it is not a sound tar."""
    path = index_path(shard, index_dir)
    made_from = {"version": VERSION, "default_source": source, **asdict(rules), **asdict(stat_shard(shard))}
    if table_exists(path):
        table, facts = read_table(path)
        if facts["made_from"] == made_from:
            return ShardReport(shard, table.num_rows, facts["problems"], reused=True)
    with whole_shard(shard) as (file, version):
        table, left_out = scan_shard(shard, file, source, rules)
    problems = dict(left_out)
    write_table(path, table, {"made_from": made_from, "version": asdict(version), "problems": problems})
    return ShardReport(shard, table.num_rows, problems, reused=False)


def open_index(data: DataConfig, pattern: str) -> Index:
    """Load the index of shards as a run uses them. Errors: as `load_index`."""
    return load_index(pattern, data.index_dir, where=data.where, duplicates=data.duplicates)


def load_index(
    pattern: str, index_dir: str = "", *, where: str = "", duplicates: Literal["keep", "drop"] = "keep"
) -> Index:
    """Load the index of a pattern's shards: the samples that a rule keeps, and of equal images the first or all.

    Errors: DataError, which names the command to run, when a shard has no index or changed since; when two samples
    share an id; when there is no sample at all. ConfigError for a rule that is not understood.
    """
    shards = expand_shards(pattern)
    rule = read_rule(where, RULE_COLUMNS) if where else None
    command = f"run python -m tools.index_shards '{pattern}'" + (f" --index-dir {index_dir}" if index_dir else "")

    def load(number: int) -> tuple[pa.Table, ShardVersion]:
        shard = shards[number]
        path = index_path(shard, index_dir)
        if not table_exists(path):
            raise DataError(f"{shard} has no index {path}; {command}")
        (table, facts), stat = read_table(path), asdict(stat_shard(shard))
        made_from = facts["made_from"]
        if made_from["version"] != VERSION:
            raise DataError(f"{path} has version {made_from['version']}, this program reads {VERSION}; {command}")
        if any(made_from[name] != value for name, value in stat.items()):
            raise DataError(f"{shard} changed after it was indexed ({stat} now); {command}")
        version = ShardVersion(**facts["version"])
        return table.append_column("shard", pa.array(np.full(table.num_rows, number, np.int32))), version

    with ThreadPoolExecutor(_LOAD_THREADS) as pool:
        tables, versions = zip(*pool.map(load, range(len(shards))), strict=True)
    table = pa.concat_tables(one.replace_schema_metadata(None) for one in tables)
    left_out = {}
    if rule is not None:
        table, left_out["data.where"] = _apply(rule, where, table)
    if duplicates == "drop":
        table, left_out["a second copy of an image"] = _first_of_each(table)
    index = _join(shards, versions, table, {reason: count for reason, count in left_out.items() if count})
    if not len(index):
        why = f"--data.where {where!r} leaves none" if left_out.get("data.where") else "the indexing printed why"
        raise DataError(f"the {len(shards)} shards of {pattern!r} hold no usable image; {why}")
    _check_ids(index)
    return index


def _apply(rule: pc.Expression, where: str, table: pa.Table) -> tuple[pa.Table, int]:
    """Return the rows that a user's rule keeps, and how many it leaves out."""
    described = table.select([name for name in RULE_COLUMNS if name in table.column_names])
    for language in LANGUAGES:
        described = described.append_column(f"captions_{language}", pc.list_value_length(table[f"{language}_bytes"]))
    described = described.append_column("row", pa.array(np.arange(table.num_rows)))
    try:
        kept = described.filter(rule)["row"]
    except pa.ArrowException as error:
        raise ConfigError(f"--data.where {where!r} does not fit the columns: {str(error).splitlines()[0]}") from None
    return table.take(kept), table.num_rows - len(kept)


def _first_of_each(table: pa.Table) -> tuple[pa.Table, int]:
    """Return one row for equal images, the first that has a caption or else the first, and how many go."""
    order = np.argsort(table["caption_member"].to_numpy() < 0, kind="stable")
    _, first = np.unique(table["content_hash"].to_numpy()[order], return_index=True)
    return (table, 0) if len(first) == len(order) else (table.take(np.sort(order[first])), len(order) - len(first))


def _check_ids(index: Index) -> None:
    ids = np.sort(index.rows["sample_id"])
    if (ids[1:] != ids[:-1]).all():
        return
    _, first = np.unique(index.rows["sample_id"], return_index=True)
    twin = int(np.setdiff1d(np.arange(len(index)), first)[0])
    raise DataError(
        f"{index.name(twin)} has the source, shard name and key of another sample; rename the shard, or index its"
        " directory with another --source"
    )


def _join(
    shards: tuple[str, ...], versions: tuple[ShardVersion, ...], table: pa.Table, left_out: dict[str, int]
) -> Index:
    rows = np.zeros(table.num_rows, ROW)
    for name in (*STORED, "shard"):
        rows[name] = table[name].to_numpy()
    sources = table["source"].unique().sort()
    rows["source"] = pc.index_in(table["source"], sources).to_numpy()
    flat = []
    for number, language in enumerate(LANGUAGES):
        column = table[f"{language}_bytes"]
        count = pc.list_value_length(column).to_numpy()
        rows["num_captions"][:, number] = count
        rows["caption_start"][:, number] = np.cumsum(count) - count
        flat.append(pc.list_flatten(column).to_numpy().astype(np.int32))
    return Index(shards, versions, tuple(sources.to_pylist()), table["key"], rows, tuple(flat), left_out)
