"""Shards as files: naming them by a pattern, reading byte ranges of them, walking through the members of their tars.

Nothing is ever extracted to disk, so links, devices and names with `..` in a tar can do no harm: only regular members
are read, by offset.
"""

from __future__ import annotations

import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, cast

import fsspec
from webdataset.shardlists import expand_urls

from cogvit.errors import DataError

Result = TypeVar("Result")

RETRY_DELAYS_S = (0.05, 0.2, 0.8)
MAX_OPEN_SHARDS = 256  # of one process; the usual limit of file descriptors is 1024
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class ShardStat:
    """What tells that a shard changed: its size and when (or as what entity) it was written."""

    size_bytes: int
    modified: str


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar, with where its bytes lie."""

    name: str
    offset_bytes: int
    data: bytes

    @property
    def key(self) -> str:
        """The sample it belongs to: the path up to the first dot of its last part, as webdataset has it."""
        directory, slash, base = self.name.rpartition("/")
        return directory + slash + base.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the key, lower case: `png`, `seg.png`."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def is_remote(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path


def expand_shards(pattern: str) -> tuple[str, ...]:
    """Return the shards that a glob, brace range or directory names, in a stable order.

    Errors: DataError when nothing matches or a shard that is named outright does not exist.
    """
    if not pattern:
        raise DataError("no shards are named: pass --data.shards PATTERN (a glob, a brace range or a directory)")
    try:
        parts = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern!r} is no brace range: {error}") from None
    shards = [shard for part in parts for shard in _expand_one(part)]
    if len(set(shards)) != len(shards):
        raise DataError(f"{pattern!r} names a shard twice")
    return tuple(shards)


def _expand_one(part: str) -> list[str]:
    fs, path = _filesystem(part)
    prefix = part[: part.index("://") + 3] if is_remote(part) else ""
    if retry(lambda: fs.isdir(path), part):
        found = retry(lambda: fs.glob(path.rstrip("/") + "/*.tar"), part)
        problem = f"the directory {part} holds no .tar shards"
    elif any(letter in path for letter in "*?["):
        found = retry(lambda: fs.glob(path), part)
        problem = f"no shard matches {part!r}"
    else:
        found = [path] if retry(lambda: fs.exists(path), part) else []
        problem = f"shard {part} does not exist"
    if not found:
        raise DataError(f"{problem}; check --data.shards")
    return [prefix + str(name) for name in sorted(found)]


def stat_shard(path: str) -> ShardStat:
    """Return a shard's size and modification mark. Errors: DataError when it is missing or out of reach."""

    def stat() -> ShardStat:
        fs, bare = _filesystem(path)
        info = fs.info(bare)
        modified = next((info[name] for name in ("ETag", "mtime", "LastModified", "created") if info.get(name)), "")
        return ShardStat(int(info["size"]), str(modified))

    return retry(stat, path)


def read_range(path: str, offset_bytes: int, size_bytes: int) -> bytes:
    """Read a byte range of a shard once; ShardReader is for many reads. Errors: DataError as ShardReader.read."""
    return ShardReader().read(path, offset_bytes, size_bytes)


class ShardReader:
    """Reads byte ranges of shards by offset; local files stay open. Threads may share it."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _LocalFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Return exactly size_bytes. Transient I/O errors are retried.

        Errors: DataError when the shard vanished, cannot be read, or ends before the range does.
        """
        if is_remote(path):
            fs, bare = _filesystem(path)
            data = retry(lambda: cast(bytes, fs.cat_file(bare, offset_bytes, offset_bytes + size_bytes)), path)
        else:
            data = retry(lambda: os.pread(self._file(path).descriptor, size_bytes, offset_bytes), path)
        if len(data) != size_bytes:
            raise DataError(
                f"{path} ends before byte {offset_bytes + size_bytes}, which its index promises; restore it or run"
                " python -m tools.index_shards again"
            )
        return data

    def _file(self, path: str) -> _LocalFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _LocalFile(path)
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file


class _LocalFile:
    """A descriptor that closes with its last reference, so that dropping it never hurts a read under way."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def retry(operation: Callable[[], Result], path: str) -> Result:
    """Run an I/O operation; transient errors are tried again. Errors: DataError with the path and the reason."""
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return operation()
        except _FINAL_ERRORS as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except OSError as error:
            if delay_s is None:
                raise DataError(f"cannot read {path} after {len(RETRY_DELAYS_S)} retries: {error}") from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


def read_members(path: str) -> Iterator[Member]:
    """Walk through a tar once and yield its regular members in order.

    Errors: DataError when it is not a plain tar, is damaged, or ends without an end marker (a killed writer's tar).
    """
    with retry(lambda: cast(BinaryIO, fsspec.open(path, "rb").open()), path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for info in archive:
                    content = archive.extractfile(info) if info.isreg() and not info.issparse() else None
                    if content is not None:
                        yield Member(info.name, info.offset_data, content.read())
                _check_end(path, stream, archive.offset)
        except tarfile.TarError as error:
            raise DataError(f"{path} is not a plain tar or is cut short: {error}; re-create it") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error


def _check_end(path: str, stream: BinaryIO, offset_bytes: int) -> None:
    """Python's reader stops without a word at a damaged header; a sound tar goes on with zeros there."""
    stream.seek(offset_bytes)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DataError(f"{path} has no end marker at byte {offset_bytes}: it is damaged or cut short; re-create it")


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path (fsspec caches it) and the path as that file system spells it: absolute."""
    try:
        fs, bare = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:  # unknown protocol, or its driver is not installed
        raise DataError(f"cannot reach {path}: {error}") from None
    return fs, bare
