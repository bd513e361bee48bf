"""The corpus file: all samples of a set of shards in one file, which a run maps and never reads as a whole.

A prelude says where the tail lies. The tail is two Arrow streams: a row a shard, and the names of the sources. In front
of it lies a block for each shard: its samples as fixed rows, and apart from them what few readers want (hashes, caption
lengths, keys). Blocks are only ever appended and the prelude is written last, so that a run which has the file mapped,
or a writer that dies, sees a whole file. What is mapped belongs to the page cache: all processes of a node share it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from cogvit.batch import SampleRef, ShardVersion
from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from data_pipeline.caption import LANGUAGES, CaptionChoice, Captions, captions_of, parse_metadata
from data_pipeline.corpus_form import (
    BLOCKS_AT,
    FACTS,
    FURTHER,
    HASHES,
    MAGIC,
    MORE,
    PRELUDE,
    ROW,
    TAR_BLOCK_BYTES,
    VERSION,
    Sections,
)
from data_pipeline.shards import ShardReader, is_pipe, is_remote, retry
from data_pipeline.table import CAPTION_EXTENSIONS, CONVERSATION

Ints = NDArray[np.int64]

CHECKED_AT_START = 4  # shards whose versions are compared when a corpus is opened; the others when they are


@dataclass(frozen=True, slots=True)
class Place:
    """Where the corpus file of a pattern lies, and the fixed start of the paths of its shards."""

    path: str
    head: str


def corpus_place(pattern: str, index_dir: str = "") -> Place:
    """Return where the corpus file of a pattern lies: in index_dir, or in the directory that all shards are below.

    A directory stands for its *.tar. Without an index_dir the file's name does not depend on that directory, so both
    can be moved. Errors: DataError for a pipe without an index_dir.
    """
    if is_pipe(pattern):
        if not index_dir:
            raise DataError(f"there is no place beside {pattern} for its index; pass --index-dir (--data.index-dir)")
        return Place(f"{index_dir.rstrip('/')}/{_file_name(pattern)}", "")
    whole = pattern if is_remote(pattern) else os.path.abspath(pattern)
    special = re.search(r"[*?\[{]|::", whole)
    if special is None and not whole.endswith(".tar") and _is_directory(whole):
        whole = whole.rstrip("/") + "/*.tar"
        special = re.search(r"\*", whole)
    head = whole[: special.start() if special else len(whole)].rpartition("/")[0] + "/"
    if index_dir:
        return Place(f"{index_dir.rstrip('/')}/{_file_name(whole)}", head)
    return Place(head + _file_name(whole[len(head) :]), head)


def _file_name(text: str) -> str:
    return f"corpus-{name_to_int64(text) & (1 << 48) - 1:012x}.cogvit"


def _is_directory(path: str) -> bool:
    fs, bare = fsspec.url_to_fs(path)
    return retry(lambda: bool(fs.isdir(bare)), path)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A mapped corpus file. Rows of all shards count on from shard to shard, in the order of the pattern."""

    path: str
    head: str
    buffer: memoryview
    mapped: NDArray[Any]  # the whole file as ROW: what a block number counts
    shards: pa.RecordBatch  # of SHARDS
    sources: pa.RecordBatch  # of SOURCES
    formats: tuple[str, ...]
    content: str  # hash of what plans depend on
    part: tuple[int, int, int] | None  # number of parts, this one's, shards of all; None for the whole
    first: Ints  # [shards + 1], row
    block: Ints  # [shards]
    checked: NDArray[np.bool_]  # [shards], whether a shard's rows were compared with their hash

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def num_shards(self) -> int:
        """Shards of the pattern."""
        return len(self.block)

    def fact(self, shard: int, name: str) -> Any:
        """Return what is written of a shard."""
        return self.shards[name][shard].as_py()

    def source_number(self, name: str) -> int:
        """Return the number of a source in rows."""
        return int(pc.index(self.sources["name"], name).as_py())

    def shard_path(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        name: str = self.fact(shard, "name")
        return name if name.startswith("/") or is_remote(name) else self.head + name

    def number(self, path: str) -> int | None:
        """Return the number of a shard by its path; None for one that is of no pattern."""
        for name in dict.fromkeys((path.removeprefix(self.head), path)):
            if (found := pc.index(self.shards["name"], name).as_py()) >= 0:
                return found
        return None

    def identity(self) -> str:
        """Return a hash of which shards are where: what plans depend on does not tell renamed keys."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("rows_hash", "apart_hash"):
            digest.update(self.shards[name].to_numpy().tobytes())
        return digest.hexdigest()

    def version(self, shard: int) -> ShardVersion:
        """Return what tells that a shard is still the one that was indexed."""
        return ShardVersion(self.fact(shard, "size_bytes"), self.fact(shard, "mark"))

    def shard(self, row: int) -> int:
        """Return the shard of a row."""
        return int(np.searchsorted(self.first, row, "right")) - 1

    def shard_of(self, rows: Ints) -> Ints:
        """Return the shards of some rows."""
        return np.searchsorted(self.first, rows, "right") - 1

    def rows_of(self, shard: int) -> NDArray[Any]:
        """Return the rows of a shard. Errors: DataError where they are not what was written."""
        start, count = int(self.block[shard]), int(self.first[shard + 1] - self.first[shard])
        rows = self.mapped[start : start + count]
        if not self.checked[shard]:
            self._compare(shard, rows, "rows_hash")
            self.checked[shard] = True
        return rows

    def take(self, rows: Ints) -> NDArray[Any]:
        """Return some rows. Errors: as `rows_of`."""
        rows = np.asarray(rows, np.int64)
        shard = self.shard_of(rows)
        for one in np.unique(shard[~self.checked[shard]]).tolist():
            self.rows_of(one)
        return self.mapped[self.block[shard] + rows - self.first[shard]]

    def ref(self, row: int, number: int = 0) -> SampleRef:
        """Return where the image of a sample lies, or further ones and videos from 1 on."""
        shard, entry = self._entry(row)
        image = self.further(shard, row)[number - 1] if number else entry
        offset_bytes = int(image["image_block"]) * TAR_BLOCK_BYTES
        size_bytes = int(image["size_bytes"])
        return SampleRef(int(entry["sample_id"]), self.shard_path(shard), offset_bytes, size_bytes, self.version(shard))

    def further(self, shard: int, row: int) -> NDArray[Any]:
        """Return MORE of the images of a sample behind its first one, and of its videos, as they are shown."""
        every = self.more(shard)
        first, last = np.searchsorted(every["row"], [row - self.first[shard], row - self.first[shard] + 1])
        return every[first:last]

    def further_of(self, rows: Ints) -> NDArray[Any]:
        """Return FURTHER of some rows: their images behind the first ones, and videos; which row, and number from 1."""
        shard, found = self.shard_of(rows), [np.zeros(0, FURTHER)]
        for one in np.unique(shard).tolist():
            if self.fact(one, "more"):
                every, places = self.more(one), np.flatnonzero(shard == one)
                inside = rows[places] - self.first[one]
                first, last = (np.searchsorted(every["row"], inside, side) for side in ("left", "right"))
                own = np.zeros(int((last - first).sum()), FURTHER)
                own["owner"] = np.repeat(places, last - first)
                before = np.repeat(np.cumsum(last - first) - (last - first), last - first)
                own["number"] = np.arange(len(own)) - before + 1
                chosen = every[np.repeat(first, last - first) + own["number"] - 1]
                for name in ("height_px", "width_px", "frames", "last_ms"):
                    own[name] = chosen[name]
                found.append(own)
        return np.concatenate(found)

    def more(self, shard: int) -> NDArray[Any]:
        """Return MORE of a shard, in the order of its samples."""
        if not self.fact(shard, "more"):
            return np.zeros(0, MORE)
        start = int(self.block[shard]) * ROW.itemsize + self._sections(shard).more
        return np.frombuffer(self.buffer, MORE, self.fact(shard, "more"), start)

    def metadata(self, row: int, reader: ShardReader) -> tuple[dict[str, Any], str]:
        """Read what is said of a sample: its json or txt, and which of them it is; nothing where it has none.

        Errors: DataError.
        """
        shard, entry = self._entry(row)
        if entry["caption_member"] < 0:
            return {}, "txt"
        offset_bytes, size_bytes = int(entry["caption_block"]) * TAR_BLOCK_BYTES, int(entry["caption_size_bytes"])
        data = reader.read(self.shard_path(shard), offset_bytes, size_bytes, self.version(shard))
        extension = (*CAPTION_EXTENSIONS, "json")[entry["caption_member"]]
        return parse_metadata(data, extension), extension

    def captions(self, row: int, reader: ShardReader, field: str = "") -> Captions:
        """Read the captions of a sample, all of them; none where it has none. field is data.caption_field.

        Errors: DataError.
        """
        if self._entry(row)[1]["caption_member"] == CONVERSATION:
            return captions_of({})
        metadata, extension = self.metadata(row, reader)
        return captions_of(metadata, field if extension == "json" else "")

    def name(self, row: int) -> str:
        """Return shard and key of a sample, for messages."""
        shard, _ = self._entry(row)
        return f"{self.shard_path(shard)}:{self.keys(shard)[row - int(self.first[shard])]}"

    def _entry(self, row: int) -> tuple[int, Any]:
        shard = self.shard(row)
        return shard, self.rows_of(shard)[row - int(self.first[shard])]

    def hashes(self, shard: int) -> NDArray[Any]:
        """Return HASHES of a shard's images. Errors: as `rows_of`."""
        return np.frombuffer(self._apart(shard), HASHES, int(self.first[shard + 1] - self.first[shard]))

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard. Errors: as `rows_of`."""
        apart, sections = self._apart(shard), self._sections(shard)
        images = int(self.first[shard + 1] - self.first[shard])
        ends = np.frombuffer(apart, np.uint32, images, sections.key_ends - sections.hashes).tolist()
        text = bytes(apart[sections.keys - sections.hashes :])
        return [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=False)]

    def lengths(self, shard: int) -> NDArray[np.uint32]:
        """Return the UTF-8 lengths of a shard's captions, in the order that caption_start counts."""
        sections = self._sections(shard)
        start = int(self.block[shard]) * ROW.itemsize + sections.lengths
        return np.frombuffer(self.buffer, np.uint32, (sections.more - sections.lengths) // 4, start)

    def chosen_bytes(self, rows: Ints, choice: CaptionChoice) -> Ints:
        """Return the UTF-8 length of the chosen caption of each of some rows, all of which have one."""
        shard, place, sizes = self.shard_of(rows), self.caption_place(rows, choice), np.zeros(len(rows), np.int64)
        for one in np.unique(shard).tolist():
            here = shard == one
            sizes[here] = self.lengths(one)[place[here]]
        return sizes

    def caption_place(self, rows: Ints, choice: CaptionChoice) -> Ints:
        """Return where the chosen captions of some rows stand among those of their shards, as `lengths` has them."""
        entries = self.take(rows)
        before = np.cumsum(entries["num_captions"], axis=1, dtype=np.int64) - entries["num_captions"]
        place = entries["caption_start"] + np.take_along_axis(before, choice.language[:, None], axis=1)[:, 0]
        return place.astype(np.int64) + choice.number

    def check_shards(self, shards: Iterable[int]) -> None:
        """Compare the rows and all else of some shards with what was written. Errors: DataError."""
        for shard in shards:
            self.rows_of(shard)
            self._apart(shard)

    def block_bytes(self, shard: int) -> memoryview:
        """Return a shard's block as it lies. Errors: DataError where it is not what was written."""
        self.check_shards([shard])
        start = int(self.block[shard]) * ROW.itemsize
        return self.buffer[start : start + self._sections(shard).end]

    def _sections(self, shard: int) -> Sections:
        captions = sum(self.fact(shard, f"captions_{language}") for language in LANGUAGES)
        return Sections.of(
            self.fact(shard, "images"), captions, self.fact(shard, "more"), self.fact(shard, "key_bytes")
        )

    def _apart(self, shard: int) -> memoryview:
        """Return what lies behind a shard's rows."""
        sections, start = self._sections(shard), int(self.block[shard]) * ROW.itemsize
        apart = self.buffer[start + sections.hashes : start + sections.keys + self.fact(shard, "key_bytes")]
        self._compare(shard, apart, "apart_hash")
        return apart

    def _compare(self, shard: int, data: Any, name: str) -> None:
        if xxhash.xxh3_64_intdigest(data) != self.fact(shard, name):
            raise _damaged(self.path, f"what it says of {self.shard_path(shard)} changed since it was written")


def _damaged(path: str, why: str) -> DataError:
    return DataError(f"{path} is damaged: {why}; remove it and run python -m tools.index_shards again")


def open_corpus(place: Place, path: str = "") -> Corpus:
    """Map a corpus file, or one of its parts by its path. A remote one is copied to this machine's temporary files.

    Errors: DataError where it is missing, cut short, damaged or of another version; FileNotFoundError where it is not
    there.
    """
    path = path or place.path
    if is_remote(path):
        fs, bare = fsspec.url_to_fs(path)
        if not retry(lambda: bool(fs.exists(bare)), path):
            raise FileNotFoundError(path)
        with tempfile.NamedTemporaryFile() as copy:
            retry(lambda: fs.get_file(bare, copy.name), path)  # never whole in memory
            buffer = _map_path(copy.name)
    else:
        buffer = _map_path(path)
    return parse_corpus(buffer, path, place.head)


def _map_path(path: str) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_file(descriptor)
    finally:
        os.close(descriptor)


def map_file(descriptor: int) -> memoryview:
    """Return the bytes of an open file, mapped; an empty file has none."""
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def parse_corpus(buffer: memoryview, path: str, head: str) -> Corpus:
    """Return the corpus in a buffer. Errors: DataError where it is cut short, damaged or of another version."""
    if len(buffer) < BLOCKS_AT:
        raise _damaged(path, f"it is cut short at {len(buffer)} bytes")
    magic, version, row_bytes, offset, size, tail_hash, own_hash = PRELUDE.unpack(buffer[: PRELUDE.size])
    if magic != MAGIC:
        raise _damaged(path, "it does not begin as a corpus file")
    if version != VERSION:
        raise DataError(
            f"{path} has version {version}, this program reads {VERSION}; run python -m tools.index_shards again"
        )
    if own_hash != xxhash.xxh3_64_intdigest(buffer[: PRELUDE.size - 8]) or row_bytes != ROW.itemsize:
        raise _damaged(path, "its first bytes changed since they were written")
    if len(buffer) < offset + size:
        raise _damaged(path, f"it is cut short at {len(buffer):,} of {offset + size:,} bytes")
    tail = buffer[offset : offset + size]
    if xxhash.xxh3_64_intdigest(tail) != tail_hash:
        raise _damaged(path, "its list of shards changed since it was written")
    stream = pa.BufferReader(pa.py_buffer(tail))
    with pa.ipc.open_stream(stream) as reader:
        facts = json.loads(reader.schema.metadata[FACTS])
        shards = reader.read_next_batch()
        reader.read_all()  # up to its end, where the other one begins
    with pa.ipc.open_stream(stream) as reader:
        sources = reader.read_next_batch()
    images = shards["images"].to_numpy()
    return Corpus(
        path=path,
        head=head,
        buffer=buffer,
        mapped=np.frombuffer(buffer, ROW, len(buffer) // ROW.itemsize),
        shards=shards,
        sources=sources,
        formats=tuple(facts["formats"]),
        content=facts["content"],
        part=tuple(facts["part"]) if facts["part"] else None,
        first=np.concatenate([[0], np.cumsum(images)]),
        block=shards["block"].to_numpy(),
        checked=np.zeros(len(images), np.bool_),
    )
