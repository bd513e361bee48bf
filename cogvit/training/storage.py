"""torch.distributed.checkpoint on a Folder: written with digests, read without running what a stranger put into it.

The library reads tensors with weights_only, but unpickles its metadata file as it is; that would run code.
"""

from __future__ import annotations

import hashlib
import pathlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from cogvit.errors import CheckpointError
from cogvit.training.folder import Folder

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


class FolderWriter(FileSystemWriter):
    """The library's writer into a folder; `digests` has what this rank wrote."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.url, sync_files=False)  # the folder syncs
        self.digests: Digests = {}
        self.fs = _Files(folder, self.digests)  # type: ignore[assignment]
        self.path = folder.url


class SafeReader(FileSystemReader):
    """The library's reader of a folder, with a metadata file that can name nothing but tensors."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.url)
        self.fs = _Files(folder, {})  # type: ignore[assignment]
        self.path = folder.url

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata. Errors: CheckpointError when the file names anything else, or is no metadata."""
        name = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(name, "rb") as stream:
            try:
                found = _Unpickler(stream).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.path}/{name} is not a checkpoint's metadata: {error}") from None
        if not isinstance(found, Metadata) or found.storage_meta is None:
            raise CheckpointError(f"{self.path}/{name} is not a checkpoint's metadata")
        found.storage_meta.load_id = self.load_id
        return found

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read every file from its beginning to its end: an object store answers each jump with a request."""

        def place(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return replace(plan, items=sorted(plan.items, key=place))


class _Files(FileSystemBase):
    """A folder as the library wants it: what it calls paths are names in the folder."""

    def __init__(self, folder: Folder, digests: Digests) -> None:
        self._folder, self._digests = folder, digests

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode == "rb":
            with self._folder.reading(path) as stream:
                yield stream
            return
        with self._folder.writing(path) as stream:
            digesting = _Digesting(stream)
            yield digesting
        self._digests[path] = digesting.entry()

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
        self._folder.write(new_path, self._folder.read(path))
        self._folder.remove(path)
        self._digests[new_path] = self._digests.pop(path)

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
