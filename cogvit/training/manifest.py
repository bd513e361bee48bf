"""What makes files a checkpoint: a manifest with their sizes and SHA-256, written last."""

from __future__ import annotations

import hashlib
import json
from typing import IO, Any

from cogvit.training.folder import Folder
from cogvit.training.storage import Digests, PartReader

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
_READ_BYTES = 1 << 24


def another_version(path: Folder) -> str | None:
    """Return what is wrong with a checkpoint's format, or None where it is ours or cannot be told."""
    try:
        return _other_format(json.loads(path.read(MANIFEST)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other_format(manifest: dict[str, Any]) -> str | None:
    """Errors: KeyError where the manifest has no format: that of every version had one, so it is damaged."""
    found = manifest["format"]
    return None if found == FORMAT else f"its format is {found}, this version reads {FORMAT}"


def read_manifest(path: Folder) -> tuple[str, Digests]:
    """Return what is wrong with a checkpoint by its manifest and its files' sizes, or "", and what it names.

    Errors: CheckpointError when an object store does not answer.
    """
    try:
        manifest = json.loads(path.read(MANIFEST))
        if foreign := _other_format(manifest):
            return foreign, {}
        files: Digests = manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except KeyError as error:
        return f"its manifest cannot be read (it has no {error})", {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})", {}
    if STATE not in expected:
        return f"its manifest does not name {STATE}", {}
    sizes = path.sizes()
    for name, (num_bytes, _) in expected.items():
        if sizes.get(name) != num_bytes:
            return f"{name} is missing or not {num_bytes} bytes long", {}
    return "", files


def verify(path: Folder) -> str | None:
    """Return what is wrong with a checkpoint, or None. Errors: CheckpointError when an object store does not answer."""
    fault, files = read_manifest(path)
    for name, entry in files.items():
        try:
            with path.reading(name) as stream:
                if _sha256(stream) != entry["sha256"]:
                    return f"{name} does not have the recorded SHA-256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return fault or None


def dealt(names: list[str], rank: int, world_size: int) -> list[str]:
    """Return the files that a rank verifies: where as many ranks wrote them, its own, else its share in their order."""
    shards = sorted((name for name in names if name.endswith(".distcp")), key=lambda name: (len(name), name))
    mine = [name for number, name in enumerate(shards) if number * world_size // len(shards) == rank]
    return mine + ([name for name in names if name not in shards] if rank == 0 else [])


def fault_of(name: str, entry: dict[str, Any], reader: PartReader) -> str:
    """Return what is wrong with a file, or ""; keeps its content for the reader."""
    try:
        content = reader.hold(name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    digest = hashlib.sha256()
    for start in range(0, len(content), _READ_BYTES):
        digest.update(content[start : start + _READ_BYTES])
    return "" if digest.hexdigest() == entry["sha256"] else f"{name} does not have the recorded SHA-256"


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while content := stream.read(_READ_BYTES):
        digest.update(content)
    return digest.hexdigest()
