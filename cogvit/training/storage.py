"""torch.distributed.checkpoint on a Folder: written with digests, read without running what a stranger put into it.

The library reads tensors with weights_only, but unpickles its metadata file as it is; that would run code.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from cogvit.errors import CheckpointError
from cogvit.training.folder import Folder

METADATA = ".metadata"
_FP32 = TensorProperties(dtype=torch.float32)
Digests = dict[str, dict[str, Any]]  # {"bytes": size, "sha256": digest} by file name

# What a metadata file of the library names when it holds tensors; dtypes come on top.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
} | {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


class Written(NamedTuple):
    """Where a rectangle of a plain tensor lies in a checkpoint."""

    key: str
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    num_bytes: int


class Part(NamedTuple):
    """A rectangle of a plain tensor."""

    key: str
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]
    values: Tensor


def write_parts(folder: Folder, name: str, parts: Iterable[Part]) -> tuple[list[Written], Digests]:
    """Write a file of the library's format; returns where everything lies and the file's digest."""
    written = []
    with folder.writing(name) as stream:
        digesting = _Digesting(stream)
        for key, shape, offsets, values in parts:
            position = digesting.tell()
            torch.save(values.clone(), digesting)  # type: ignore[arg-type]  # a view would bring all of its storage
            sizes = tuple(values.shape)
            written.append(Written(key, shape, offsets, sizes, name, position, digesting.tell() - position))
    return written, {name: digesting.entry()}


def write_metadata(folder: Folder, written: Iterable[Written]) -> Digests:
    """Write what the library needs to find every tensor."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for key, shape, offsets, sizes, file, position, num_bytes in written:
        if key not in tensors:
            tensors[key] = TensorStorageMetadata(_FP32, torch.Size(shape), [])
        index = MetadataIndex(key, torch.Size(offsets), len(tensors[key].chunks))
        tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        places[index] = filesystem._StorageInfo(file, position, num_bytes)
    found = Metadata(
        dict(tensors), {key: (key,) for key in tensors}, places, StorageMeta(folder.url), filesystem.CURRENT_DCP_VERSION
    )
    content = pickle.dumps(found)
    folder.write(METADATA, content)
    return {METADATA: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


class PartReader:
    """Reads rectangles of the tensors of a checkpoint, and no more of its files than that.

    A file of the library holds tensors one after the other, each a zip archive of which one record, not compressed, is
    the values row by row. bytes_read: so far.
    """

    def __init__(self, folder: Folder, metadata: bytes) -> None:
        self._folder, self._held = folder, dict[str, memoryview]()
        self._metadata = load_metadata(metadata, f"{folder}/{METADATA}")
        self.bytes_read = 0

    def hold(self, name: str) -> memoryview:
        """Return a file's content and keep it for what is read of it later."""
        content = self._held[name] = self._folder.view(name)
        self.bytes_read += len(content)
        return content

    def read(self, part: Part) -> None:
        """Fill a rectangle. Errors: CheckpointError when the checkpoint has no such tensor, or not all of it."""
        stored = self._metadata.state_dict_metadata.get(part.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"it has no {part.key}")
        if tuple(stored.size) != part.shape:
            raise CheckpointError(f"{part.key} has shape {tuple(stored.size)} there, {part.shape} here")
        missing = part.values.numel()
        for chunk in stored.chunks:
            low = tuple(map(max, part.offsets, chunk.offsets))
            high = tuple(
                min(a + m, b + n)
                for a, m, b, n in zip(part.offsets, part.values.shape, chunk.offsets, chunk.sizes, strict=True)
            )
            sizes = tuple(b - a for a, b in zip(low, high, strict=True))
            if min(sizes) <= 0:
                continue
            place = self._metadata.storage_data[MetadataIndex(part.key, chunk.offsets)]
            inside = tuple(a - b for a, b in zip(low, chunk.offsets, strict=True))
            here = tuple(slice(a - b, c - b) for a, b, c in zip(low, part.offsets, high, strict=True))
            part.values[here] = self._cut(place, tuple(chunk.sizes), inside, sizes, stored.properties.dtype)
            missing -= prod(sizes)
        if missing:
            raise CheckpointError(f"{missing} values of {part.key} are not in it")

    def _cut(
        self, place: Any, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Return a rectangle of one stored tensor, run by run of neighboring values."""
        content = _Window(self, place.relative_path, place.offset, place.offset + place.length)
        start = _values_start(content)
        whole = len(shape)  # dims from this one on are taken whole, so their values are one run
        while whole > 0 and sizes[whole - 1] == shape[whole - 1]:
            whole -= 1
        outer = max(whole - 1, 0)
        run = prod(sizes[outer:]) * dtype.itemsize
        strides = [prod(shape[dim + 1 :]) * dtype.itemsize for dim in range(len(shape))]
        first = start + sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        values = bytearray()
        for index in product(*map(range, sizes[:outer])):
            position = first + sum(i * stride for i, stride in zip(index, strides[:outer], strict=True))
            values += content.range(position, position + run)
        return torch.frombuffer(values, dtype=dtype).view(sizes)

    def range(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """Return some bytes of a file."""
        if name in self._held:
            return self._held[name][start:stop]
        self.bytes_read += stop - start
        return self._folder.read_range(name, start, stop)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, reader: PartReader, name: str, start: int, stop: int) -> None:
        self._reader, self._name, self._start, self._size = reader, name, start, stop - start
        self._position = 0

    def range(self, start: int, stop: int) -> bytes | memoryview:
        return self._reader.range(self._name, self._start + start, self._start + stop)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._position + size, self._size)
        content = bytes(self.range(self._position, stop))
        self._position = stop
        return content


def _values_start(content: _Window) -> int:
    """Return where a stored tensor's values begin: behind the header of their record."""
    try:
        with zipfile.ZipFile(content) as archive:  # type: ignore[arg-type]
            (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"a tensor in it cannot be read: {error}") from None
    header = bytes(content.range(record.header_offset, record.header_offset + 30))
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return int(record.header_offset + 30 + name_bytes + extra_bytes)


class SafeReader(FileSystemReader):
    """The library's reader of a folder, with a metadata file that can name nothing but tensors."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.url)
        self.fs = _Files(folder)  # type: ignore[assignment]
        self.path = folder.url

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata. Errors: CheckpointError when the file names anything else, or is no metadata."""
        name = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(name, "rb") as stream:
            found = load_metadata(stream.read(), f"{self.path}/{name}")
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        return found

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read every file from its beginning to its end: an object store answers each jump with a request."""

        def place(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return replace(plan, items=sorted(plan.items, key=place))


def load_metadata(content: bytes, name: str) -> Metadata:
    """Return a metadata file's content. Errors: CheckpointError when it names anything but tensors, or is none."""
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is not a checkpoint's metadata: {error}") from None
    if not isinstance(found, Metadata) or found.storage_meta is None:
        raise CheckpointError(f"{name} is not a checkpoint's metadata")
    return found


class _Files(FileSystemBase):
    """A folder as the library's reader wants it: what it calls paths are names in the folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode != "rb":
            raise io.UnsupportedOperation(f"{path} is opened for {mode}; `write_parts` writes")
        with self._folder.reading(path) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        """Writing makes the folder."""

    def exists(self, path: Any) -> bool:
        return path in self._folder.sizes()

    def rm_file(self, path: Any) -> None:
        self._folder.remove(path)

    def rename(self, path: Any, new_path: Any) -> None:
        raise io.UnsupportedOperation(f"{path} stays where it is")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Digesting:
    """A stream that only goes forward and digests what it is given, so that nothing is read back."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._sha256, self._bytes = stream, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self._sha256.update(content)
        self._bytes += len(content)
        return self._stream.write(content)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The folder closes its stream itself, after syncing it."""

    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return _ALLOWED[module, name]
