"""Reading what torch.distributed.checkpoint wrote without running anything a stranger put into it.

The library reads tensors with weights_only, but unpickles its metadata file as it is; that would run code.
"""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from cogvit.errors import CheckpointError

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


class SafeReader(FileSystemReader):
    """The library's reader with a metadata file that can name nothing but tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata. Errors: CheckpointError when the file names anything else, or is no metadata."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            try:
                found = _Unpickler(stream).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is not a checkpoint's metadata: {error}") from None
        if not isinstance(found, Metadata) or found.storage_meta is None:
            raise CheckpointError(f"{path} is not a checkpoint's metadata")
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return _ALLOWED[module, name]
