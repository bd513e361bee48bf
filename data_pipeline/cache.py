"""The cache of remote shards on a node's disk: whole shards, as many bytes as it may hold, shared by all its processes.

An entry is named by a hash of its bytes, which the index knows, and is compared with it when it is fetched. So a shard
that changed at its source is refused, what was fetched before a restart is used again without asking anybody, and a
moved shard is fetched once. The directory is the only state, so processes need nothing but its name.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cogvit.batch import ShardVersion
from cogvit.config import DataConfig
from cogvit.errors import DataError
from data_pipeline.shards import changed, copy_shard

_UNFINISHED = ".part"
_LOCK = "lock"
_POLL_S = 0.05


def cache_of(data: DataConfig) -> ShardCache | None:
    """Return the cache that a configuration asks for."""
    return ShardCache(os.path.abspath(data.cache_dir), data.cache_bytes) if data.cache_dir else None


@dataclass(frozen=True, slots=True)
class ShardCache:
    """A directory of shards, on a disk of the node: its locks are those of processes that run there.

    Files that are being fetched count with their full size. The entry that was read longest ago goes first.
    """

    directory: str
    limit_bytes: int

    def read(self, path: str, offset_bytes: int, size_bytes: int, version: ShardVersion) -> bytes:
        """Return the bytes of a range of a shard, which is fetched first where it is not there.

        Errors: DataError when it cannot be fetched, is not the version that was indexed, or has no room.
        """
        try:
            descriptor = self._open(version)
            if descriptor is None:
                descriptor = self._fetch(path, version)
            try:
                os.utime(descriptor)
                return os.pread(descriptor, size_bytes, offset_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"--data.cache-dir {self.directory} cannot be used: {error.strerror or error}") from error

    def _entry(self, version: ShardVersion) -> Path:
        return Path(self.directory, version.mark)

    def _open(self, version: ShardVersion) -> int | None:
        """Return a descriptor of an entry, which outlives its eviction; None where it is not there."""
        try:
            descriptor = os.open(self._entry(version), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == version.size_bytes:
            return descriptor
        os.close(descriptor)  # somebody cut it
        self._entry(version).unlink(missing_ok=True)
        return None

    def _fetch(self, path: str, version: ShardVersion) -> int:
        """Copy a shard into the cache, or wait for the process that does; returns a descriptor of the entry."""
        if version.size_bytes > self.limit_bytes:
            raise DataError(
                f"{path} has {version.size_bytes} bytes, more than --data.cache-bytes {self.limit_bytes}; raise it"
            )
        while True:
            with self._locked():
                if (descriptor := self._open(version)) is not None:
                    return descriptor
                descriptor = self._reserve(version)
            if descriptor is not None:
                break
            time.sleep(_POLL_S)
        unfinished = self._entry(version).with_suffix(_UNFINISHED)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                if copy_shard(path, file, at_most_bytes=version.size_bytes) != version:
                    raise changed(path)
                os.fsync(descriptor)
            with self._locked():
                unfinished.rename(self._entry(version))
        except BaseException:
            unfinished.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, version: ShardVersion) -> int | None:
        """Make room for a shard and hold it with a file of its size; None where others are in the way for now."""
        unfinished = self._entry(version).with_suffix(_UNFINISHED)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o644)
        reserved = False
        try:
            if _is_ours(descriptor) and self._make_room(unfinished, version.size_bytes):
                os.truncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, max(1, version.size_bytes))
                reserved = True
        finally:  # a full disk must not keep the lock
            if not reserved:
                os.close(descriptor)
        return descriptor if reserved else None

    def _make_room(self, unfinished: Path, needed_bytes: int) -> bool:
        """Remove what died while it was fetched, and the entries that were read longest ago, as far as it takes."""
        entries, total_bytes = [], needed_bytes
        for path in Path(self.directory).iterdir():
            if path in (unfinished, Path(self.directory, _LOCK)):
                continue
            if path.suffix == _UNFINISHED and _is_dead(path):
                path.unlink()
                continue
            stat = path.stat()
            total_bytes += stat.st_size
            if path.suffix != _UNFINISHED:
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        if total_bytes - sum(size_bytes for _, size_bytes, _ in entries) > self.limit_bytes:
            return False
        for _, size_bytes, path in sorted(entries):
            if total_bytes <= self.limit_bytes:
                break
            path.unlink()
            total_bytes -= size_bytes
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory, which is made if need be: one process at a time makes room or reserves it."""
        os.makedirs(self.directory, exist_ok=True)
        with Path(self.directory, _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_ours(descriptor: int) -> bool:
    """Lock a file until it is closed; whether nobody else has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_dead(unfinished: Path) -> bool:
    """Whether the process that fetched a file is gone."""
    with unfinished.open("rb") as file:
        return _is_ours(file.fileno())
