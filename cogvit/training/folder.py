"""A directory on a disk or a prefix in an object store, behind fsspec: where checkpoints lie."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cogvit.errors import CheckpointError


@dataclass(frozen=True)
class Folder:
    """Files by name under a path or fsspec URL; a file is there once it is whole.

    Errors: FileNotFoundError for what does not exist and, on a disk, any other OSError; CheckpointError when an object
    store does not answer, or its driver is missing.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is on a file system of this machine."""
        return isinstance(self._place()[0], LocalFileSystem)

    @property
    def path(self) -> str:
        """The URL as its file system spells it, without the protocol."""
        return self._place()[1]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file in it, by name; empty where the folder is not there."""
        return {name: entry["size"] for name, entry in self._entries().items() if entry["type"] == "file"}

    def folders(self) -> list[str]:
        """Return the names of the folders in it, sorted; empty where the folder is not there."""
        return sorted(name for name, entry in self._entries().items() if entry["type"] == "directory")

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self.reading(name) as stream:
            return stream.read()

    def view(self, name: str, start: int, stop: int) -> memoryview:
        """Return some bytes of a file; of a file on a disk, as they lie in the system's cache.

        Torch wants memory that can be written; what is written there stays in this process.
        """
        fs, path = self._place()
        if not isinstance(fs, LocalFileSystem):
            with self._answers():
                return memoryview(bytearray(fs.cat_file(f"{path}/{name}", start=start, end=stop)))
        with open(f"{path}/{name}", "rb") as stream:
            if start == stop:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))[start:stop]

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file."""
        with self.writing(name) as stream:
            stream.write(content)

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading."""
        fs, path = self._place()
        with self._answers(), fs.open(f"{path}/{name}", "rb") as stream:
            yield stream

    @contextmanager
    def writing(self, name: str, *, begins: bool = True, ends: bool = True) -> Iterator[IO[bytes]]:
        """Open a file that appears at the end of the block, whole and on disk; the folder is made where it must be.

        On a disk several processes can write one after the other: the first begins the file, and it appears when the
        last ends it.
        """
        fs, path = self._place()
        if not isinstance(fs, LocalFileSystem):  # an object appears when its upload ends
            with self._answers(), fs.open(f"{path}/{name}", "wb") as stream:
                yield stream
            return
        os.makedirs(path, exist_ok=True)
        partial = f"{path}/.{name}.partial"
        with open(partial, "wb" if begins else "ab") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if ends:
            os.replace(partial, f"{path}/{name}")

    def remove(self, name: str = "") -> None:
        """Remove a file, or the folder with all that is in it; what is not there is no error."""
        fs, path = self._place()
        fs.invalidate_cache()
        with suppress(FileNotFoundError), self._answers():
            fs.rm(f"{path}/{name}" if name else path, recursive=not name)

    def _entries(self) -> dict[str, dict[str, Any]]:
        fs, path = self._place()
        fs.invalidate_cache()  # other processes write here too
        try:
            with self._answers():
                entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        named = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        named.pop("", None)
        return named

    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, path = fsspec.url_to_fs(self.url)  # fsspec keeps one of each
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{self.url} cannot be used: {error}") from None
        return fs, path.rstrip("/")

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Tell an object store that fails from a file that is not there: the one must not pass for the other."""
        try:
            yield
        except (FileNotFoundError, CheckpointError):
            raise
        except Exception as error:  # each driver has its own
            if self.is_local:
                raise
            raise CheckpointError(f"{self.url} does not answer: {type(error).__name__}: {error}") from None
