"""Shards as files: naming them by a pattern, reading byte ranges of them, walking through the members of their tars.

A shard is a local file, an fsspec URL, or a `pipe:COMMAND` of the shell that prints one.

Nothing is ever extracted to disk, so links, devices and names with `..` in a tar can do no harm: only regular members
are read, by offset.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Protocol, TypeVar, cast

import fsspec
import xxhash
from webdataset.shardlists import expand_urls

from cogvit.batch import ShardVersion
from cogvit.draws import name_to_int64
from cogvit.errors import DataError

Result = TypeVar("Result")

RETRY_DELAYS_S = (0.05, 0.2, 0.8)
# Of one process: half of what it may have open, or the blocks of a few hundred shares.
MAX_OPEN_SHARDS = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 4096)
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PIPE = "pipe:"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar, with where its bytes lie."""

    name: str
    offset_bytes: int
    data: bytes
    is_regular: bool = True  # a link or device is not followed, and has no bytes

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
    """Whether a path is an fsspec URL or a pipe."""
    return is_pipe(path) or "://" in path


def is_pipe(path: str) -> bool:
    """Whether a path is a command."""
    return path.startswith(_PIPE)


def shard_name(path: str) -> str:
    """Return the file name that a shard goes by; that of a pipe is the last .tar in its command, or else a hash."""
    if not is_pipe(path):
        return path.rpartition("/")[2]
    named = re.findall(r"[^\s/'\"=?&;|<>()]+\.tar\b", path)
    return named[-1] if named else f"{name_to_int64(path) & (1 << 64) - 1:016x}.tar"


def expand_shards(pattern: str) -> tuple[str, ...]:
    """Return the shards that a glob, brace range or directory names, in a stable order.

    Errors: DataError when nothing matches or a shard that is named outright does not exist.
    """
    if not pattern:
        raise DataError("no shards are named: pass --data.shards PATTERN (a glob, a brace range or a directory)")
    try:
        # A file or directory of that name is what is meant, whatever else its letters may mean.
        parts = [pattern] if not is_remote(pattern) and os.path.exists(pattern) else expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern!r} is no brace range: {error}") from None
    shards = [shard for part in parts for shard in _expand_one(part)]
    if len(set(shards)) != len(shards):
        raise DataError(f"{pattern!r} names a shard twice")
    return tuple(shards)


def _expand_one(part: str) -> list[str]:
    if is_pipe(part):
        return [part]
    fs, path = filesystem(part)
    prefix = part[: part.index("://") + 3] if is_remote(part) else ""
    if retry(lambda: fs.isdir(path), part):
        found = retry(lambda: fs.glob(_literal(path.rstrip("/")) + "/*.tar"), part)
        problem = f"the directory {part} holds no .tar shards"
    elif retry(lambda: fs.isfile(path), part):
        found, problem = [path], ""
    elif any(letter in path for letter in "*?["):
        found = retry(lambda: fs.glob(path), part)
        head, _, tail = path.rpartition("/")
        if not found and retry(lambda: fs.isdir(head), part):  # brackets in the directory's own name
            found = retry(lambda: fs.glob(f"{_literal(head)}/{tail}"), part)
        problem = f"no shard matches {part!r}"
    else:
        found = [path] if retry(lambda: fs.exists(path), part) else []
        problem = f"shard {part} does not exist"
    if not found:
        raise DataError(f"{problem}; check the pattern")
    return [str(name) if "://" in str(name) else prefix + str(name) for name in sorted(found)]  # http keeps it


def _literal(path: str) -> str:
    """Return a path as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def stat_shard(path: str) -> ShardVersion:
    """Return a shard's size and modification mark, without reading it; nothing tells those of a pipe.

    Errors: DataError when it is missing or out of reach.
    """

    def stat() -> ShardVersion:
        fs, bare = filesystem(path)
        info = fs.info(bare)
        modified = next((info[name] for name in ("ETag", "mtime", "LastModified", "created") if info.get(name)), "")
        return ShardVersion(int(info["size"]), str(modified))

    return ShardVersion(0, "") if is_pipe(path) else retry(stat, path)


class RemoteReader(Protocol):
    """Reads remote shards in another way than range by range; cache.ShardCache does."""

    def read(self, path: str, offset_bytes: int, size_bytes: int, version: ShardVersion) -> bytes:
        """Return the bytes of a range, fewer where the shard ends."""


class ShardReader:
    """Reads byte ranges of shards by offset; local files stay open. Threads may share it."""

    def __init__(self, remote: RemoteReader | None = None) -> None:
        self._remote = remote
        self._open: OrderedDict[str, _LocalFile] = OrderedDict()
        self._copies: dict[str, ShardVersion] = {}  # with another time than the indexed shards, and their bytes
        self._lock = threading.Lock()

    def read(self, path: str, offset_bytes: int, size_bytes: int, version: ShardVersion | None = None) -> bytes:
        """Return exactly size_bytes. Transient I/O errors are retried.

        A version is compared when a local file is opened or the remote reader takes the shard; ranges of a URL that are
        read one by one are taken as they are.
        Errors: DataError when the shard vanished, changed, cannot be read, or ends before the range does.
        """
        if not is_remote(path):
            data = retry(lambda: os.pread(self._file(path, version).descriptor, size_bytes, offset_bytes), path)
        elif self._remote is not None and version is not None:
            data = self._remote.read(path, offset_bytes, size_bytes, version)
        else:
            data = _read_remote(path, offset_bytes, size_bytes)
        if len(data) != size_bytes:
            raise DataError(
                f"{path} ends before byte {offset_bytes + size_bytes}, which its index promises; restore it or run"
                " python -m tools.index_shards again"
            )
        return data

    def _file(self, path: str, version: ShardVersion | None) -> _LocalFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._opened(path)
                if version is not None and not self._is(file, path, version):
                    raise changed(path)
                self._open[path] = file
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file

    def _opened(self, path: str) -> _LocalFile:
        """Open a file; where the process may have no more, as many of the others as it takes are closed."""
        while True:
            try:
                return _LocalFile(path)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._open.popitem(last=False)

    def _is(self, file: _LocalFile, path: str, version: ShardVersion) -> bool:
        """As `is_version`; the bytes of a copy are read once."""
        if self._copies.get(path) == file.version:
            return True
        same = is_version(file.descriptor, file.version, version)
        if same and not has_time(file.version, version):
            self._copies[path] = file.version
        return same


class _LocalFile:
    """A descriptor that closes with its last reference, so that dropping it never hurts a read under way."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        stat = os.fstat(self.descriptor)
        self.version = ShardVersion(stat.st_size, str(stat.st_mtime))  # as stat_shard has it

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def sealed(file: IO[bytes], version: ShardVersion) -> ShardVersion:
    """Return a local shard's version with a hash of its bytes behind its time: a copy with another time is known by it.

    Errors: OSError.
    """
    return ShardVersion(version.size_bytes, f"{version.mark} {_digest(file.fileno())}")


def is_version(descriptor: int, now: ShardVersion, then: ShardVersion) -> bool:
    """Whether an open local shard is the one that was indexed: of its size and time, or else of its bytes, all read.

    Errors: OSError.
    """
    digest = then.mark.partition(" ")[2]
    if now.size_bytes != then.size_bytes:
        return False
    return has_time(now, then) or (bool(digest) and _digest(descriptor) == digest)


def has_time(now: ShardVersion, then: ShardVersion) -> bool:
    """Whether a local shard has the size and time of the one that was indexed, which a look at its directory says."""
    return (now.size_bytes, now.mark) == (then.size_bytes, then.mark.partition(" ")[0])


def _digest(descriptor: int) -> str:
    digest, offset_bytes = xxhash.xxh3_128(), 0
    while block := os.pread(descriptor, _COPY_BYTES, offset_bytes):
        digest.update(block)
        offset_bytes += len(block)
    return digest.hexdigest()


def _read_remote(path: str, offset_bytes: int, size_bytes: int) -> bytes:
    if is_pipe(path):
        raise DataError(f"{path} prints a shard from its start, and samples are read by offset; pass --data.cache-dir")
    fs, bare = filesystem(path)
    data = retry(lambda: cast(bytes, fs.cat_file(bare, offset_bytes, offset_bytes + size_bytes)), path)
    if len(data) > size_bytes:
        raise DataError(f"the server of {path} sends whole files instead of byte ranges; pass --data.cache-dir")
    return data


def changed(path: str) -> DataError:
    """Return the error for a shard that is no longer what its index says."""
    return DataError(f"{path} changed after it was indexed; restore it or run python -m tools.index_shards again")


def copy_shard(path: str, file: IO[bytes], *, at_most_bytes: float = float("inf")) -> ShardVersion:
    """Copy a shard to the start of a file; returns its size and a hash of its bytes.

    Stops soon after at_most_bytes, and then says so by a size beyond them. Errors: DataError when it cannot be read.
    """

    def copy() -> ShardVersion:
        digest, size_bytes = hashlib.blake2b(digest_size=16), 0
        file.seek(0)
        with open_stream(path) as stream:
            while size_bytes <= at_most_bytes and (block := stream.read(_COPY_BYTES)):
                file.write(block)
                digest.update(block)
                size_bytes += len(block)
        file.flush()
        file.truncate(size_bytes)
        return ShardVersion(size_bytes, digest.hexdigest())

    return retry(copy, path)


@contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a shard to be read once from its start.

    Errors: OSError, from a pipe too when its command fails; what a file system of fsspec raises.
    """
    if not is_pipe(path):
        fs, bare = filesystem(path)
        with fs.open(bare, "rb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as complaints:
        with subprocess.Popen(path[len(_PIPE) :], shell=True, stdout=subprocess.PIPE, stderr=complaints) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
                at_end = not process.stdout.read(1)
            except BaseException:
                process.kill()
                raise
        if process.returncode and at_end:  # a command that is cut off dies of SIGPIPE
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"its command left with status {process.returncode}{': ' + said[-1] if said else ''}")


def retry(operation: Callable[[], Result], path: str) -> Result:
    """Run an I/O operation; transient errors are tried again. Errors: DataError with the path and the reason."""
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return operation()
        except DataError:
            raise
        except _FINAL_ERRORS as error:
            reason = error.strerror or error
            raise DataError(f"cannot read {path}: {reason}; restore it, or index the shards without it") from error
        except Exception as error:  # the drivers of remote stores have errors of their own
            if not isinstance(error, OSError) and not is_remote(path):
                raise
            if delay_s is None:
                raise DataError(f"cannot read {path} after {len(RETRY_DELAYS_S)} retries: {error}") from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


@contextmanager
def whole_shard(path: str) -> Iterator[tuple[IO[bytes], ShardVersion]]:
    """Open a shard as a file that can be sought, with its version; a remote one is copied to a temporary file.

    Errors: DataError when it cannot be read.
    """
    if not is_remote(path):
        version = stat_shard(path)
        with retry(lambda: open(path, "rb"), path) as file:
            yield file, version
        return
    with tempfile.TemporaryFile() as file:
        yield file, copy_shard(path, file)


def read_members(path: str) -> Iterator[Member]:
    """Walk through a tar once and yield its regular members in order. Errors: as `members_of`; DataError."""
    with whole_shard(path) as (file, _):
        yield from (member for member in members_of(path, file) if member.is_regular)


def members_of(path: str, stream: IO[bytes]) -> Iterator[Member]:
    """Yield the members of an open tar in order, without its directories.

    Errors: DataError when it is not a plain tar, is damaged, or ends without an end marker (a killed writer's tar).
    """
    try:
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                content = archive.extractfile(info) if info.isreg() and not info.issparse() else None
                if content is not None:
                    yield Member(info.name, info.offset_data, content.read())
                elif not info.isdir():
                    yield Member(info.name, info.offset_data, b"", is_regular=False)
            _check_end(path, stream, archive.offset)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a plain tar or is cut short: {error}; re-create it") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _check_end(path: str, stream: IO[bytes], offset_bytes: int) -> None:
    """Python's reader stops without a word at a damaged header; a sound tar goes on with zeros there."""
    stream.seek(offset_bytes)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DataError(f"{path} has no end marker at byte {offset_bytes}: it is damaged or cut short; re-create it")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path (fsspec caches it) and the path as that file system spells it: absolute."""
    if not is_remote(path):  # fsspec would take a :: for a chain of file systems
        return fsspec.filesystem("file"), os.path.abspath(path)
    try:
        fs, bare = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:  # unknown protocol, or its driver is not installed
        raise DataError(f"cannot reach {path}: {error}") from None
    return fs, bare
