"""The index: where every sample lies, its size and how long its captions are, known before any pixel is decoded.

`build_index` reads each shard once, writes SHARD.parquet and ends with the corpus file of all of them; `load_index`
maps that one file and says which of its samples are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cogvit.batch import SampleRef, ShardVersion
from cogvit.config import DataConfig
from cogvit.errors import DataError
from data_pipeline.caption import LANGUAGES, CaptionChoice
from data_pipeline.corpus import CHECKED_AT_START, Corpus, Place, corpus_place, open_corpus
from data_pipeline.corpus_form import HASHES
from data_pipeline.merge import Entry, made_from_hash, merge, temporary_corpus
from data_pipeline.rules import Rules
from data_pipeline.scan import scan_shard
from data_pipeline.select import Choice, Needs, Selection, select
from data_pipeline.shards import expand_shards, has_time, is_remote, is_version, retry, sealed, stat_shard, whole_shard
from data_pipeline.table import VERSION, index_path, read_facts, read_table, table_exists, write_table

Ints = NDArray[np.int64]

DEFAULT_SOURCE = "default"
JOINED_AT_START = 1024  # shards of a pattern without a corpus file, at most
_SOURCES_TOLD = 20  # a json may call anything a source, as the page that an image is from


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What indexing one shard gave."""

    shard: str
    num_images: int
    problems: dict[str, int]  # reason -> how many members or samples it cost
    reused: bool  # its index was there and fits
    made_from: int  # hash of what its index was made from
    failure: str = ""  # why there is no index


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of a corpus that are used. A row is the number of a sample among all of the corpus."""

    corpus: Corpus
    selection: Selection

    def __len__(self) -> int:
        return self.selection.images

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources that have samples."""
        return tuple(name for name, _ in self.selection.by_source)

    def content_hash(self) -> str:
        """Return a hash of everything that plan and placement depend on; moving or renaming directories keeps it."""
        return self.selection.content

    def take(self, rows: Ints) -> NDArray[Any]:
        """Return some rows, as corpus.ROW."""
        return self.corpus.take(rows)

    def hashes(self, rows: Ints) -> NDArray[Any]:
        """Return the hashes of the images of some rows, as corpus.HASHES."""
        shard, found = self.corpus.shard_of(rows), np.empty(len(rows), HASHES)
        for one in np.unique(shard).tolist():
            here = shard == one
            found[here] = self.corpus.hashes(one)[rows[here] - self.corpus.first[one]]
        return found

    def ref(self, row: int, number: int = 0) -> SampleRef:
        """Return where the image of a sample lies, or further ones and videos from 1 on."""
        return self.corpus.ref(row, number)

    def name(self, row: int) -> str:
        """Return shard and key of a sample, for messages."""
        return self.corpus.name(row)

    def rows_of_shard(self, shard: int, source: str | None = None) -> Ints:
        """Return the used rows of a shard, or of one source in it, in their order."""
        entries, first = self.corpus.rows_of(shard), int(self.corpus.first[shard])
        used = self.selection.of_shard(shard, len(entries))
        if source is not None:
            mine = entries["source"] == self.corpus.source_number(source)
            used = mine if used is None else mine & used
        return np.arange(first, first + len(entries)) if used is None else first + np.flatnonzero(used)

    def rows_of(self, source: str | None = None) -> Ints:
        """Return all used rows, or those of a source: 8 bytes a sample, for corpora that are used as a whole."""
        every = [self.rows_of_shard(shard, source) for shard in range(self.corpus.num_shards)]
        return np.concatenate([np.zeros(0, np.int64), *every])

    def captioned(self) -> Index:
        """Return the index of the samples that have a caption; the others are counted as left out."""
        return self.having("caption")

    def having(self, needs: Needs) -> Index:
        """Return the index of the samples that have what is needed; the others are counted as left out."""
        counted = {"image": "pictured", "caption": "captioned", "text": "spoken"}.get(needs)
        if counted is None or pc.sum(self.corpus.shards[counted]).as_py() == len(self.corpus):
            return self
        return Index(self.corpus, select(self.corpus, replace(self.selection.choice, needs=needs)))

    def chosen_bytes(self, rows: Ints, choice: CaptionChoice) -> Ints:
        """Return the UTF-8 length of the chosen caption of each of some rows, all of which have one."""
        return self.corpus.chosen_bytes(rows, choice)

    def describe(self) -> str:
        """Return one line: images, shards, sources and captions."""
        found = self.selection
        told = sorted(sorted(found.by_source, key=lambda pair: (-pair[1], pair[0]))[:_SOURCES_TOLD])
        sources = ", ".join(f"{name} {count:,}" for name, count in told)
        sources += f" and {len(found.by_source) - len(told):,} more" if len(told) < len(found.by_source) else ""
        captions = ", ".join(f"{one} {count:,}" for one, count in zip(LANGUAGES, found.captions, strict=True))
        left_out = "".join(f"; left out: {count:,} x {reason}" for reason, count in found.reasons.items())
        shards = self.corpus.num_shards
        return f"{len(self):,} images in {shards:,} shards; sources: {sources}; captions: {captions}{left_out}"


def build_index(
    pattern: str, index_dir: str = "", source: str = DEFAULT_SOURCE, rules: Rules | None = None
) -> Iterator[ShardReport]:
    """Index the shards of a pattern one by one, then write its corpus file; a shard whose index fits is left alone.

    source names the samples whose json names none. Errors: DataError as `shards_to_index`, `index_shard` and `merge`.
    """
    entries = []
    for shard in shards_to_index(pattern, index_dir):
        report = index_shard(shard, index_dir, source, rules or Rules())
        entries.append(Entry(shard, report.made_from))
        yield report
    merge(corpus_place(pattern, index_dir), entries, index_dir)


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
        num_images, facts = read_facts(path)
        if facts["made_from"] == made_from:
            return ShardReport(shard, num_images, facts["problems"], True, made_from_hash(facts))
    with whole_shard(shard) as (file, version):
        table, left_out = scan_shard(shard, file, source, rules)
        if not is_remote(shard):
            version = sealed(file, version)
    problems = dict(left_out)
    facts = {"made_from": made_from, "version": asdict(version), "problems": problems}
    write_table(path, table, facts)
    return ShardReport(shard, table.num_rows, problems, False, made_from_hash(facts))


def open_index(data: DataConfig, pattern: str) -> Index:
    """Open the index of shards as a run uses them. Errors: as `load_index`."""
    return load_index(pattern, data.index_dir, where=data.where, duplicates=data.duplicates)


def _how(was: ShardVersion, now: ShardVersion) -> str:
    """Say in what a shard differs from the one that was indexed."""
    if was.size_bytes != now.size_bytes:
        return f"{was.size_bytes:,} bytes then, {now.size_bytes:,} now"
    return "its size is the same, its time and bytes are not"


def _compare(shard: str, then: ShardVersion, command: str) -> None:
    """Check that a local shard is the one that was indexed, whatever the time of a copy.

    Errors: DataError, which says how it differs and what to run.
    """
    now = stat_shard(shard)
    if has_time(now, then):
        return
    with retry(lambda: open(shard, "rb"), shard) as file:
        if not retry(lambda: is_version(file.fileno(), now, then), shard):
            raise DataError(f"{shard} changed after it was indexed ({_how(then, now)}); {command}")


def _indexed(facts: dict[str, Any]) -> ShardVersion:
    return ShardVersion(facts["size_bytes"], facts["mark"])


def _joined(pattern: str, place: Place, index_dir: str, command: str) -> Corpus:
    """Return the corpus of a few shards that have an index each, and no corpus file together.

    Errors: DataError for many shards, or one whose index is missing or does not fit.
    """
    shards = expand_shards(pattern)
    if len(shards) > JOINED_AT_START:
        raise DataError(f"the {len(shards):,} shards of {pattern!r} have no corpus file {place.path}; {command}")

    def indexes() -> Iterator[tuple[Entry, pa.Table, dict[str, Any]]]:
        for shard in shards:
            path = index_path(shard, index_dir)
            if not table_exists(path):
                raise DataError(f"{shard} has no index {path}; {command}")
            table, facts = read_table(path)
            version = facts["made_from"]["version"]
            if version != VERSION:
                raise DataError(f"{path} has version {version}, this program reads {VERSION}; {command}")
            if is_remote(shard) and (now := stat_shard(shard)) != (then := _indexed(facts["made_from"])):
                raise DataError(f"{shard} changed after it was indexed ({_how(then, now)}); {command}")
            if not is_remote(shard):
                _compare(shard, _indexed(facts["version"]), command)
            yield Entry(shard, made_from_hash(facts)), table, facts

    return temporary_corpus(place.head, indexes())


def checked_at_start(num_shards: int) -> list[int]:
    """Return the shards that are compared with a corpus file when it is opened: all of a few."""
    chosen: list[int] = np.unique(np.linspace(0, num_shards - 1, CHECKED_AT_START).astype(np.int64)).tolist()
    return chosen


def load_index(
    pattern: str, index_dir: str = "", *, where: str = "", duplicates: Literal["keep", "drop"] = "keep"
) -> Index:
    """Open the corpus file of a pattern: the samples that a rule keeps, and of equal images the first or all.

    What is opened does not depend on the number of shards. A few of them are compared with the file; the others are
    when they are first read.
    Errors: DataError, which names the command to run, when there is no corpus file, it is damaged, or a shard changed
    since; when there is no sample at all. ConfigError for a rule that is not understood.
    """
    place = corpus_place(pattern, index_dir)
    command = f"run python -m tools.index_shards '{pattern}'" + (f" --index-dir {index_dir}" if index_dir else "")
    try:
        corpus = open_corpus(place)
    except FileNotFoundError:
        corpus = _joined(pattern, place, index_dir, command)
    for shard in checked_at_start(corpus.num_shards):
        path = corpus.shard_path(shard)
        if not is_remote(path):
            _compare(path, corpus.version(shard), command)
    index = Index(corpus, select(corpus, Choice(where, duplicates)))
    if not len(index):
        why = (
            f"--data.where {where!r} leaves none"
            if index.selection.reasons.get("data.where")
            else "the indexing printed why"
        )
        raise DataError(f"the {corpus.num_shards} shards of {pattern!r} hold no usable image; {why}")
    return index
