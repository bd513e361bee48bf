"""Writing a corpus file: the indexes of its shards, and what other corpus files already hold of them, put together.

A shard whose index is the one that a corpus file was made from costs its line in the tail; the file is appended to.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from cogvit.errors import ConfigError, DataError
from data_pipeline.caption import LANGUAGES
from data_pipeline.corpus import Corpus, Place, map_file, open_corpus, parse_corpus
from data_pipeline.corpus_form import (
    BLOCKS_AT,
    HASHES,
    MORE,
    PRELUDE,
    ROW,
    SHARDS,
    TAR_BLOCK_BYTES,
    Sections,
    prelude_bytes,
    tail_bytes,
)
from data_pipeline.shards import is_remote, shard_name
from data_pipeline.table import CONVERSATION, index_path, read_table

_COPIED = tuple(name for name in ROW.names or () if name in ("sample_id", "size_bytes", "caption_size_bytes", "label"))
_DEAD_SHARE = 0.5  # of a file in blocks of no shard and older lists, beyond which it is written anew


@dataclass(frozen=True, slots=True)
class Entry:
    """A shard of a corpus."""

    path: str
    made_from: int  # hash of what its index was made from; 0 takes the shard as the corpus files hold it


@dataclass
class _Codes:
    """Numbers of names, in the order in which they came up."""

    names: list[str] = field(default_factory=list)
    number: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(names: Sequence[str]) -> _Codes:
        """Number some names."""
        return _Codes(list(names), {name: number for number, name in enumerate(names)})

    def codes(self, names: Sequence[str]) -> NDArray[np.uint32]:
        """Return the numbers of names; new ones are added."""
        for name in names:
            if name not in self.number:
                self.number[name] = len(self.names)
                self.names.append(name)
        return np.array([self.number[name] for name in names], np.uint32)


@dataclass
class _Writer:
    """Blocks on their way into a corpus file."""

    file: IO[bytes]
    head: str
    sources: _Codes
    formats: _Codes
    lines: list[dict[str, Any]] = field(default_factory=list)  # of SHARDS

    def keep(self, line: dict[str, Any]) -> None:
        """Take a shard whose block is in the file."""
        self.lines.append(line)

    def copy(self, corpus: Corpus, shard: int) -> None:
        """Take a shard of another corpus file, whose sources and formats have numbers of their own."""
        line = corpus.shards.slice(shard, 1).to_pylist()[0]
        block = np.frombuffer(bytearray(corpus.block_bytes(shard)), np.uint8)
        rows = block[: line["images"] * ROW.itemsize].view(ROW)
        names = corpus.sources["name"].to_pylist()
        sources = self.sources.codes(names)
        rows["source"] = sources[rows["source"]]
        rows["format"] = self.formats.codes(corpus.formats)[rows["format"]]
        line |= {"sources": sources[line["sources"]], "rows_hash": xxhash.xxh3_64_intdigest(rows.tobytes())}
        self._put(line, block)

    def add(self, entry: Entry, table: pa.Table, facts: dict[str, Any]) -> None:
        """Take a shard from its index."""
        name = entry.path.removeprefix(self.head)
        line, block = _encode(table, self.sources, self.formats)
        version = facts["version"]
        line |= {"name": name, "mark": version["mark"], "size_bytes": version["size_bytes"]}
        self._put(line | {"made_from": entry.made_from}, block)

    def _put(self, line: dict[str, Any], block: NDArray[np.uint8]) -> None:
        offset = self.file.seek(0, os.SEEK_CUR)
        self.file.write(block.data)
        self.lines.append(line | {"block": offset // ROW.itemsize})

    def finish(self, part: tuple[int, int, int] | None) -> None:
        """Write the tail behind the blocks, and then the prelude, which makes them count."""
        shards = pa.Table.from_pylist(self.lines, schema=SHARDS)
        _check_names(shards, self.sources.names)
        content = hashlib.blake2b(shards["content"].to_numpy().tobytes(), digest_size=8).hexdigest()
        tail = tail_bytes(shards, self.sources.names, self.formats.names, content, part)
        offset = -(-self.file.seek(0, os.SEEK_CUR) // 64) * 64
        self.file.seek(offset)
        self.file.write(tail)
        self.file.seek(-(offset + tail.size) % ROW.itemsize, os.SEEK_CUR)
        self.file.truncate()
        _sync(self.file)
        self.file.seek(0)
        self.file.write(prelude_bytes(offset, tail))
        _sync(self.file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def made_from_hash(facts: dict[str, Any]) -> int:
    """Return a hash of what an index was made from."""
    return xxhash.xxh3_64_intdigest(repr(sorted(facts["made_from"].items())).encode())


def merge(place: Place, entries: Sequence[Entry], index_dir: str = "", part: tuple[int, int] | None = None) -> str:
    """Write the corpus file of some shards, or the part i of n of one; returns its path.

    Errors: DataError for shards that share name and source, ConfigError where there is no room for the file.
    """
    path = part_path(place, *part) if part else place.path
    written = (part[1], part[0], len(entries)) if part else None
    present = _present(place, path)
    _write(place, path, [present] if present is not None else [], entries, index_dir, written)
    return path


def merge_parts(place: Place, num_parts: int) -> str:
    """Put the parts of a corpus together and remove them; returns the path of the whole.

    Errors: DataError for a part that is missing, or a shard that two have.
    """
    parts = []
    for number in range(num_parts):
        try:
            parts.append(open_corpus(place, part_path(place, number, num_parts)))
        except FileNotFoundError as error:
            raise DataError(
                f"part {number} of {num_parts}, {error.filename or error}, is missing; run python -m"
                f" tools.index_shards with --part {number}/{num_parts}"
            ) from None
    entries = [
        Entry(one.shard_path(shard), one.fact(shard, "made_from")) for one in parts for shard in range(one.num_shards)
    ]
    seen: set[str] = set()
    for entry in entries:
        if entry.path in seen:
            raise DataError(
                f"two of {num_parts} parts have {entry.path}: its directory changed between them; index them again"
            )
        seen.add(entry.path)
    present = _present(place, place.path)
    _write(place, place.path, [*([] if present is None else [present]), *parts], entries, "", None)
    fs, _ = fsspec.url_to_fs(place.path)
    for number in range(num_parts):
        fs.rm(fsspec.url_to_fs(part_path(place, number, num_parts))[1])
    return place.path


def temporary_corpus(head: str, shards: Iterable[tuple[Entry, pa.Table, dict[str, Any]]]) -> Corpus:
    """Return a corpus of some indexes with their facts that goes with the process, in a file without a name."""
    with tempfile.TemporaryFile() as file:
        file.seek(BLOCKS_AT)
        writer = _Writer(file, head, _Codes.of([]), _Codes.of([]))
        for entry, table, facts in shards:
            writer.add(entry, table, facts)
        writer.finish(None)
        return parse_corpus(map_file(file.fileno()), "", head)


def part_path(place: Place, number: int, num_parts: int) -> str:
    """Return where a part of a corpus lies."""
    return f"{place.path}.part-{number}-of-{num_parts}"


def _present(place: Place, path: str) -> Corpus | None:
    """Return the corpus file that is there, if it is of any use."""
    try:
        return open_corpus(place, path)
    except (DataError, FileNotFoundError):
        return None


def _write(
    place: Place,
    path: str,
    donors: list[Corpus],
    entries: Sequence[Entry],
    index_dir: str,
    part: tuple[int, int, int] | None,
) -> None:
    """Write a corpus file; the first donor may be the file itself, which is then appended to."""
    known = {
        (one.shard_path(shard), one.fact(shard, "made_from")): (one, shard)
        for one in reversed(donors)
        for shard in range(one.num_shards)
    }
    found = [known.get((entry.path, entry.made_from)) for entry in entries]
    own = donors[0] if donors and donors[0].path == path and not is_remote(path) else None
    if own is not None:
        live = sum(_block_bytes(own, place_[1]) for place_ in found if place_ is not None and place_[0] is own)
        own = own if live + own.shards.nbytes >= (1.0 - _DEAD_SHARE) * len(own.buffer) else None
    if own is not None and found == [(own, shard) for shard in range(own.num_shards)]:
        return
    try:
        with _opened(path, own) as file:
            writer = _Writer(file, place.head, _Codes.of([]), _Codes.of([]))
            if own is not None:
                writer.sources = _Codes.of(own.sources["name"].to_pylist())
                writer.formats = _Codes.of(own.formats)
            for entry, place_ in zip(entries, found, strict=True):
                if place_ is None:
                    writer.add(entry, *read_table(index_path(entry.path, index_dir)))
                elif place_[0] is own:
                    writer.keep(own.shards.slice(place_[1], 1).to_pylist()[0])
                else:
                    writer.copy(*place_)
            writer.finish(part)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room" if full else "let this user write there"
        raise ConfigError(
            f"cannot write {path} ({error.strerror or error}); {way_out}, or pass --index-dir DIR"
        ) from None


def _block_bytes(corpus: Corpus, shard: int) -> int:
    captions = sum(corpus.fact(shard, f"captions_{language}") for language in LANGUAGES)
    more, key_bytes = corpus.fact(shard, "more"), corpus.fact(shard, "key_bytes")
    return Sections.of(corpus.fact(shard, "images"), captions, more, key_bytes).end


@contextmanager
def _opened(path: str, own: Corpus | None) -> Iterator[IO[bytes]]:
    """Open a corpus file to write blocks: at the end of the one that is there, or a new one that replaces it whole."""
    if own is not None:
        with open(path, "r+b") as file:
            _lock(file, path)
            # One that was appended to has grown, one that was replaced begins otherwise: what it points to stays.
            grown = os.fstat(file.fileno()).st_size != len(own.buffer)
            if grown or file.read(PRELUDE.size) != own.buffer[: PRELUDE.size]:
                raise DataError(f"another process has just written {path}; run the command again")
            end = -(-len(own.buffer) // ROW.itemsize) * ROW.itemsize
            file.seek(end)
            try:
                yield file
            except BaseException:
                if file.seek(0, os.SEEK_END) > end:  # the old prelude still counts, and what it points to
                    file.truncate(end)
                raise
        return
    if is_remote(path):
        with tempfile.NamedTemporaryFile() as file:
            file.seek(BLOCKS_AT)
            yield file
            fs, bare = fsspec.url_to_fs(path)
            fs.put_file(file.name, bare)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.partial"
    try:
        with open(temporary, "w+b") as file:
            file.seek(BLOCKS_AT)
            yield file
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _lock(file: IO[bytes], path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is writing {path}; wait for it") from None
    except OSError:  # a file system without locks
        return


def _check_names(shards: pa.Table, sources: list[str]) -> None:
    """Keys differ inside a shard, so samples do where no two shards share both name and source. Errors: DataError."""
    names = pc.replace_substring_regex(shards["name"], ".*/", "")
    if pc.count_distinct(names).as_py() == len(names):
        return
    first: dict[tuple[str, int], int] = {}
    for number, (path, own) in enumerate(zip(shards["name"].to_pylist(), shards["sources"].to_pylist(), strict=True)):
        for source in own:
            if first.setdefault((shard_name(path), source), number) != number:
                raise DataError(
                    f"{path} has the name of another shard, and both have samples of source {sources[source]!r};"
                    " rename the shard, or index its directory with another --source (and, where a json names one,"
                    " --source-field none)"
                )


def _encode(table: pa.Table, sources: _Codes, formats: _Codes) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Return the line of a shard and its block. table is of table.SCHEMA."""
    rows, hashes = np.zeros(table.num_rows, ROW), np.zeros(table.num_rows, HASHES)
    for name in _COPIED:
        rows[name] = table[name].to_numpy()
    for name in ("height_px", "width_px", "caption_member"):
        rows[name] = table[name].to_numpy()
    for name, offset in (("image_block", "offset_bytes"), ("caption_block", "caption_offset_bytes")):
        rows[name] = table[offset].to_numpy() // TAR_BLOCK_BYTES
    named = table["source"].combine_chunks().dictionary_encode()
    own = sources.codes(named.dictionary.to_pylist())
    rows["source"] = own[named.indices.to_numpy(zero_copy_only=False)]
    kinds = table["format"].combine_chunks().dictionary_encode()
    rows["format"] = formats.codes(kinds.dictionary.to_pylist())[kinds.indices.to_numpy(zero_copy_only=False)]
    for name in HASHES.names or ():
        hashes[name] = table[name].to_numpy()
    lengths, more = _interleave(rows, table), _further(table)
    keys = [key.encode() for key in table["key"].to_pylist()]
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64).astype(np.uint32)
    apart = b"".join([hashes.tobytes(), lengths.tobytes(), more.tobytes(), ends.tobytes(), *keys])
    counts = np.bincount(named.indices.to_numpy(zero_copy_only=False), minlength=len(own))
    content = xxhash.xxh3_64(hashes["content_hash"].tobytes())
    for name in ("sample_id", "height_px", "width_px", "num_captions"):
        content.update(rows[name].tobytes())
    content.update(lengths.tobytes() + repr(table["source"].to_pylist()).encode() + more.tobytes())
    line: dict[str, Any] = {
        "images": table.num_rows,
        "captioned": int(((rows["caption_member"] >= 0) & (rows["caption_member"] != CONVERSATION)).sum()),
        "pictured": int((rows["height_px"] > 0).sum()),
        "spoken": int((rows["caption_member"] >= 0).sum()),
        "more": len(more),
        "key_bytes": sum(map(len, keys)),
        "rows_hash": xxhash.xxh3_64_intdigest(rows.tobytes()),
        "apart_hash": xxhash.xxh3_64_intdigest(apart),
        "content": content.intdigest(),
        "sources": own,
        "source_images": counts,
    }
    line |= {f"captions_{name}": int(rows["num_captions"][:, n].sum()) for n, name in enumerate(LANGUAGES)}
    end = Sections.of(table.num_rows, len(lengths), len(more), line["key_bytes"]).end
    block = np.zeros(end, np.uint8)
    block[: rows.nbytes] = rows.view(np.uint8)
    block[rows.nbytes : rows.nbytes + len(apart)] = np.frombuffer(apart, np.uint8)
    return line, block


def _further(table: pa.Table) -> NDArray[Any]:
    """Return MORE of a shard."""
    counts = pc.list_value_length(table["more_offset_bytes"]).to_numpy()
    more = np.zeros(counts.sum(), MORE)
    if len(more):
        more["row"] = np.repeat(np.arange(len(counts)), counts)
        more["image_block"] = pc.list_flatten(table["more_offset_bytes"]).to_numpy() // TAR_BLOCK_BYTES
        for name in ("size_bytes", "height_px", "width_px", "frames", "last_ms"):
            more[name] = pc.list_flatten(table[f"more_{name}"]).to_numpy()
    return more


def _interleave(rows: NDArray[Any], table: pa.Table) -> NDArray[np.uint32]:
    """Fill in the numbers of captions, and return their lengths: sample after sample, there language after language."""
    for number, language in enumerate(LANGUAGES):
        rows["num_captions"][:, number] = pc.list_value_length(table[f"{language}_bytes"]).to_numpy()
    counts = rows["num_captions"].astype(np.int64)
    rows["caption_start"] = counts.sum(axis=1).cumsum() - counts.sum(axis=1)
    lengths = np.zeros(counts.sum(), np.uint32)
    for number, language in enumerate(LANGUAGES):
        own = counts[:, number]
        start = rows["caption_start"] + counts[:, :number].sum(axis=1)
        inside = np.arange(own.sum()) - np.repeat(own.cumsum() - own, own)
        lengths[np.repeat(start, own) + inside] = pc.list_flatten(table[f"{language}_bytes"]).to_numpy()
    return lengths
