"""An object store on a directory that all processes see: no folders, no renaming, an object appears when it is whole.

`s3` is the real protocol with moto's server, where s3fs and moto are installed.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec

PROTOCOL = "objects"


class ObjectStore(fsspec.AbstractFileSystem):
    """objects://BUCKET/KEY; every object is a file of one directory, $OBJECT_STORE, named by its quoted key."""

    protocol = PROTOCOL
    cachable = False

    def _file(self, path: str) -> Path:
        return Path(os.environ["OBJECT_STORE"]) / quote(self._strip_protocol(path), safe="")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        return io.BytesIO(self._file(path).read_bytes()) if mode == "rb" else _Upload(self._file(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        prefix = self._strip_protocol(path).rstrip("/") + "/"
        found: dict[str, dict[str, Any]] = {}
        for file in Path(os.environ["OBJECT_STORE"]).iterdir():
            key = unquote(file.name)
            if key.startswith(prefix) and not file.name.startswith("."):
                first, *deeper = key.removeprefix(prefix).split("/")
                size = 0 if deeper else file.stat().st_size
                found[first] = {"name": prefix + first, "size": size, "type": "directory" if deeper else "file"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [entry["name"] for entry in found.values()]

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()


class _Upload(io.BytesIO):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def close(self) -> None:
        if not self.closed:
            self._file.write_bytes(self.getvalue())
        super().close()


def use_objects(directory: str) -> None:
    """Make objects:// known to this process."""
    os.environ["OBJECT_STORE"] = directory
    fsspec.register_implementation(PROTOCOL, ObjectStore, clobber=True)


def use_s3(endpoint: str) -> None:
    """Point this process's s3:// at a server, and forget an earlier one."""
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1"}
    fsspec.get_filesystem_class("s3").clear_instance_cache()
