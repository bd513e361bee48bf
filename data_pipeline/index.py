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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cogvit.batch import SampleRef
from cogvit.draws import name_to_int64
from cogvit.errors import DataError
from data_pipeline.caption import LANGUAGES, CaptionChoice, captions_of, parse_metadata
from data_pipeline.decode import image_size_px
from data_pipeline.shards import Member, expand_shards, read_members, retry, stat_shard

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
            digest.update(self.rows[name].tobytes())
        for lengths in self.caption_bytes:
            digest.update(lengths.tobytes())
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
    if len({index_path(shard, index_dir) for shard in shards}) != len(shards):
        raise DataError(f"--index-dir {index_dir}: shards of {pattern!r} share a file name; index each directory apart")
    for shard in shards:
        path = index_path(shard, index_dir)
        identity = {"version": VERSION, "default_source": source, **asdict(stat_shard(shard))}
        stored = _read_table(path) if _exists(path) else None
        if stored is not None and _facts(stored)["identity"] == identity:
            yield ShardReport(shard, stored.num_rows, _facts(stored)["problems"], reused=True)
            continue
        problems: Counter[str] = Counter()
        table = _scan_shard(shard, source, problems)
        facts = {"identity": identity, "problems": dict(problems)}
        _write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(facts)}), path)
        yield ShardReport(shard, table.num_rows, dict(problems), reused=False)


def load_index(pattern: str, index_dir: str = "") -> Index:
    """Load the index of a pattern's shards.

    Errors: DataError, which names the command to run, when a shard has no index or changed since; when two samples
    share an id; when there is no sample at all.
    """
    shards = expand_shards(pattern)
    command = f"run python -m tools.index_shards '{pattern}'" + (f" --index-dir {index_dir}" if index_dir else "")

    def load(shard: str) -> pa.Table:
        path = index_path(shard, index_dir)
        if not _exists(path):
            raise DataError(f"{shard} has no index {path}; {command}")
        table, stat = _read_table(path), asdict(stat_shard(shard))
        identity = _facts(table)["identity"]
        if identity["version"] != VERSION:
            raise DataError(f"{path} has version {identity['version']}, this program reads {VERSION}; {command}")
        if any(identity[name] != value for name, value in stat.items()):
            raise DataError(f"{shard} changed after it was indexed ({stat} now); {command}")
        return table

    with ThreadPoolExecutor(_LOAD_THREADS) as pool:
        index = _join(shards, list(pool.map(load, shards)))
    if not len(index):
        raise DataError(f"the {len(shards)} shards of {pattern!r} hold no usable image; the indexing printed why")
    ids, first = np.unique(index.rows["sample_id"], return_index=True)
    if len(ids) != len(index):
        twin = int(np.setdiff1d(np.arange(len(index)), first)[0])
        raise DataError(
            f"{index.name(twin)} has the source, shard name and key of another sample; rename the shard, or index its"
            " directory with another --source"
        )
    return index


def _join(shards: tuple[str, ...], tables: list[pa.Table]) -> Index:
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    rows = np.empty(table.num_rows, ROW)
    for name in _STORED:
        rows[name] = table[name].to_numpy()
    rows["shard"] = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    sources = table["source"].unique().sort()
    rows["source"] = pa.compute.index_in(table["source"], sources).to_numpy()
    flat = []
    for number, language in enumerate(LANGUAGES):
        column = table[f"{language}_bytes"]
        count = pa.compute.list_value_length(column).to_numpy()
        rows["num_captions"][:, number] = count
        rows["caption_start"][:, number] = np.cumsum(count) - count
        flat.append(pa.compute.list_flatten(column).to_numpy().astype(np.int32))
    return Index(shards, tuple(sources.to_pylist()), table["key"], rows, tuple(flat))


def _scan_shard(shard: str, default_source: str, problems: Counter[str]) -> pa.Table:
    """Read a shard once and return its table; what cannot be used is counted in problems."""
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Member]] = {}
    for member in read_members(shard):
        if not member.name.isprintable():
            problems["a name is not printable UTF-8"] += 1
        elif member.extension in CAPTION_EXTENSIONS:
            texts.setdefault(member.key, {})[member.extension] = member
        elif member.extension in IMAGE_EXTENSIONS and member.key in images:
            problems["a second image of the same key"] += 1
        elif member.extension in IMAGE_EXTENSIONS:
            try:
                images[member.key] = _image_columns(member)
            except DataError as error:
                problems[str(error)] += 1
    problems["captions without an image"] += len(texts.keys() - images.keys())
    shard_name = shard.rpartition("/")[2]
    for key, row in images.items():
        row |= {"key": key, "source": default_source} | _caption_columns(texts.get(key, {}), problems)
        row["sample_id"] = name_to_int64(f"{row['source']}/{shard_name}/{key}")
    problems += Counter()  # drops what was counted zero times
    return pa.Table.from_pylist(list(images.values()), schema=SCHEMA)


def _image_columns(member: Member) -> dict[str, Any]:
    height_px, width_px = image_size_px(member.data)
    return {
        "content_hash": int.from_bytes(hashlib.blake2b(member.data, digest_size=8).digest(), "little", signed=True),
        "offset_bytes": member.offset_bytes,
        "size_bytes": len(member.data),
        "height_px": height_px,
        "width_px": width_px,
    }


def _caption_columns(members: dict[str, Member], problems: Counter[str]) -> dict[str, Any]:
    """Return the source, if the json names one, and where the captions lie: in the json, or else in the txt."""
    columns: dict[str, Any] = {"caption_offset_bytes": 0, "caption_size_bytes": 0, "caption_member": -1}
    columns |= {f"{language}_bytes": [] for language in LANGUAGES}
    for number, extension in enumerate(CAPTION_EXTENSIONS):
        if extension not in members:
            continue
        member = members[extension]
        try:
            metadata = parse_metadata(member.data, extension)
        except DataError as error:
            problems[str(error)] += 1
            continue
        if isinstance(source := metadata.get("source"), str) and source:
            columns["source"] = source
        captions = captions_of(metadata)
        if any(captions.values()) and columns["caption_member"] < 0:
            columns |= {
                f"{language}_bytes": [len(text.encode()) for text in captions[language]] for language in captions
            }
            columns["caption_member"] = number
            columns["caption_offset_bytes"] = member.offset_bytes
            columns["caption_size_bytes"] = len(member.data)
    return columns


def _exists(path: str) -> bool:
    fs, bare = fsspec.url_to_fs(path)
    return retry(lambda: bool(fs.exists(bare)), path)


def _read_table(path: str) -> pa.Table:
    def read() -> bytes:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())

    foreign = DataError(f"{path} is no index of this program; remove it and run python -m tools.index_shards again")
    try:
        table = pq.read_table(io.BytesIO(retry(read, path)))
    except pa.ArrowInvalid:
        raise foreign from None
    if table.schema.names != SCHEMA.names or _METADATA_KEY not in (table.schema.metadata or {}):
        raise foreign
    return table


def _facts(table: pa.Table) -> dict[str, Any]:
    return json.loads(table.schema.metadata[_METADATA_KEY])


def _write_table(table: pa.Table, path: str) -> None:
    """Write all or nothing: a reader never sees half an index."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    fs, bare = fsspec.url_to_fs(path)
    temporary = f"{bare}.{os.getpid()}.partial"
    fs.makedirs(bare.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(temporary, buffer.getvalue())
    fs.mv(temporary, bare)
