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
Digests = dict[str, dict[str, Any]]  # {"bytes": size, "sha256": digest} by file name; see `manifest.stretches_of`

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


def write_parts(
    folder: Folder, name: str, parts: Iterable[Part], *, begins: bool = True, ends: bool = True
) -> tuple[list[Written], dict[str, Any]]:
    """Write a stretch of a file of the library's format; returns where everything lies, and its bytes and digest.

    begins, ends: whether the file does here; others write the rest of it.
    """
    written = []
    with folder.writing(name, begins=begins, ends=ends) as stream:
        before = 0 if begins else stream.tell()
        digesting = _Digesting(stream)
        for key, shape, offsets, values in parts:
            position = digesting.tell()
            torch.save(values.clone(), digesting)  # type: ignore[arg-type]  # a view would bring all of its storage
            sizes, num_bytes = tuple(values.shape), digesting.tell() - position
            written.append(Written(key, shape, offsets, sizes, name, before + position, num_bytes))
    return written, digesting.entry()


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


class Stretch(NamedTuple):
    """Bytes of a file that one rank wrote and one rank verifies; every tensor lies in one."""

    file: str
    start: int
    stop: int
    sha256: str


class PartReader:
    """Puts rectangles of the tensors of a checkpoint together from the bytes of its files that it is given.

    A file of the library holds tensors one after the other, each a zip archive of which one record, not compressed, is
    the values row by row. bytes_read: so far, by this process.
    """

    def __init__(self, folder: Folder, metadata: bytes) -> None:
        self._folder = folder
        self._metadata = load_metadata(metadata, f"{folder}/{METADATA}")
        self._held: dict[Stretch, memoryview] = {}
        self._tensors: dict[tuple[str, int], memoryview] = {}  # by file and offset: what others read and this one needs
        self.bytes_read = 0

    def hold(self, stretch: Stretch) -> memoryview:
        """Read a stretch, keep it for what is taken out of it later, and return it."""
        content = self._held[stretch] = self._folder.view(stretch.file, stretch.start, stretch.stop)
        self.bytes_read += len(content)
        return content

    def held(self, stretch: Stretch, start: int, num_bytes: int) -> memoryview:
        """Return some bytes of its file, from `start` on, out of a stretch that is held."""
        return self._held[stretch][start - stretch.start :][:num_bytes]

    def expect(self, part: Part) -> None:
        """Keep room for the stored tensors that a rectangle is made of, where this process does not hold them."""
        for place in (place for place, *_ in self._pieces(part)):
            if self._found(place) is None:
                self._tensors[place.relative_path, place.offset] = memoryview(bytearray(place.length))

    def lacks(self, stretch: Stretch) -> bool:
        """Whether something that is expected lies in a stretch."""
        return any(file == stretch.file and stretch.start <= at < stretch.stop for file, at in self._tensors)

    def take(self, file: str, start: int, content: memoryview) -> None:
        """Keep what is expected out of some bytes of a file."""
        for (name, at), room in self._tensors.items():
            low, high = max(at, start), min(at + len(room), start + len(content))
            if name == file and low < high:
                room[low - at : high - at] = content[low - start : high - start]

    def read(self, part: Part) -> None:
        """Fill a rectangle. Errors: CheckpointError when the checkpoint has no such tensor, or not all of it."""
        stored, missing = self._stored(part), part.values.numel()
        for place, shape, inside, sizes, here in self._pieces(part):
            content = self._found(place)
            assert content is not None, "what is read is held or was expected"
            part.values[here] = _cut(content, shape, inside, sizes, stored.properties.dtype)
            missing -= prod(sizes)
        if missing:
            raise CheckpointError(f"{missing} values of {part.key} are not in it")

    def _stored(self, part: Part) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(part.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"it has no {part.key}")
        if tuple(stored.size) != part.shape:
            raise CheckpointError(f"{part.key} has shape {tuple(stored.size)} there, {part.shape} here")
        return stored

    def _pieces(self, part: Part) -> Iterator[tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...], Any]]:
        """Yield place and shape of each stored tensor that a rectangle overlaps, and where.

        The overlap is given by its offsets in the stored tensor, its sizes, and its slices of the rectangle.
        """
        for chunk in self._stored(part).chunks:
            low = tuple(map(max, part.offsets, chunk.offsets))
            high = tuple(
                min(a + m, b + n)
                for a, m, b, n in zip(part.offsets, part.values.shape, chunk.offsets, chunk.sizes, strict=True)
            )
            sizes = tuple(b - a for a, b in zip(low, high, strict=True))
            if min(sizes, default=1) <= 0:
                continue
            place = self._metadata.storage_data[MetadataIndex(part.key, chunk.offsets)]
            inside = tuple(a - b for a, b in zip(low, chunk.offsets, strict=True))
            here = tuple(slice(a - b, c - b) for a, b, c in zip(low, part.offsets, high, strict=True))
            yield place, tuple(chunk.sizes), inside, sizes, here

    def _found(self, place: Any) -> memoryview | None:
        """Return a stored tensor's bytes, if they are here."""
        for (file, start, stop, _), content in self._held.items():
            if file == place.relative_path and start <= place.offset < stop:
                return content[place.offset - start : place.offset - start + place.length]
        return self._tensors.get((place.relative_path, place.offset))


def _cut(
    content: memoryview, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return a rectangle of one stored tensor."""
    start = _values_start(content)
    values = torch.frombuffer(content, dtype=torch.uint8)[start : start + prod(shape) * dtype.itemsize]
    if values.data_ptr() % dtype.itemsize:  # what precedes it in the file has any length
        values = values.clone()
    whole = values.view(dtype).view(shape)
    return whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]


class _Window(io.RawIOBase):
    """Some bytes as a file, without a copy of them."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = len(self._content) if size < 0 else self._position + size
        content = bytes(self._content[self._position : stop])
        self._position += len(content)
        return content


def _values_start(content: memoryview) -> int:
    """Return where a stored tensor's values begin: behind the header of their record."""
    try:
        with zipfile.ZipFile(_Window(content)) as archive:  # type: ignore[arg-type]
            (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"a tensor in it cannot be read: {error}") from None
    header = content[record.header_offset : record.header_offset + 30]
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
