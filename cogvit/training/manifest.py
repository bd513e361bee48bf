"""What makes files a checkpoint: a manifest with their sizes and SHA-256, written last.

A file that several ranks wrote has a digest for the stretch of each, so that no rank reads what another wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

from cogvit.training.folder import Folder
from cogvit.training.storage import Digests, PartReader, Stretch

FORMAT, _OLDER = 3, 2  # files of format 2 have one digest each
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
    return None if found in (FORMAT, _OLDER) else f"its format is {found}, this version reads {_OLDER} and {FORMAT}"


def read_manifest(path: Folder) -> tuple[str, Digests]:
    """Return what is wrong with a checkpoint by its manifest and its files' sizes, or "", and what it names.

    Errors: CheckpointError when an object store does not answer.
    """
    try:
        manifest = json.loads(path.read(MANIFEST))
        if foreign := _other_format(manifest):
            return foreign, {}
        files: Digests = manifest["files"]
        expected = {name: (entry["bytes"], stretches_of(name, entry)) for name, entry in files.items()}
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


def joined(entries: Iterable[tuple[str, dict[str, Any]]]) -> Digests:
    """Return what the manifest says of files, given the stretches of each in their order."""
    files: Digests = {}
    for name, entry in entries:
        file = files.setdefault(name, {"bytes": 0, "sha256": []})
        file["bytes"] += entry["bytes"]
        file["sha256"].append([entry["bytes"], entry["sha256"]])
    return files


def stretches_of(name: str, entry: dict[str, Any]) -> list[Stretch]:
    """Return the stretches of a file by its entry in a manifest. Errors: ValueError when they are not all of it."""
    digests = entry["sha256"]
    parts = [(entry["bytes"], digests)] if isinstance(digests, str) else digests
    edges = list(accumulate((num_bytes for num_bytes, _ in parts), initial=0))
    if edges[-1] != entry["bytes"]:
        raise ValueError(f"{name} has {entry['bytes']} bytes, its parts {edges[-1]}")
    return [Stretch(name, *edge, digest) for edge, (_, digest) in zip(pairwise(edges), parts, strict=True)]


def verify(path: Folder) -> str | None:
    """Return what is wrong with a checkpoint, or None. Errors: CheckpointError when an object store does not answer."""
    fault, files = read_manifest(path)
    for stretch in (stretch for name in files for stretch in stretches_of(name, files[name])):
        try:
            content = path.view(stretch.file, stretch.start, stretch.stop)
        except OSError as error:
            return f"{stretch.file} cannot be read ({error.strerror or error})"
        if _sha256(content) != stretch.sha256:
            return f"{stretch.file} does not have the recorded SHA-256"
    return fault or None


def dealt(files: Digests, world_size: int) -> list[tuple[int, Stretch]]:
    """Return who reads and verifies what: each its own where as many ranks wrote, else its share in their order."""
    names = sorted(files, key=lambda name: (not name.endswith(".distcp"), len(name), name))
    stretches = [stretch for name in names for stretch in stretches_of(name, files[name])]
    shards = sum(stretch.file.endswith(".distcp") for stretch in stretches)
    return [(number * world_size // shards if number < shards else 0, one) for number, one in enumerate(stretches)]


def fault_of(stretch: Stretch, reader: PartReader) -> str:
    """Return what is wrong with a stretch, or ""; keeps its content for the reader."""
    try:
        content = reader.hold(stretch)
    except OSError as error:
        return f"{stretch.file} cannot be read ({error.strerror or error})"
    return "" if _sha256(content) == stretch.sha256 else f"{stretch.file} does not have the recorded SHA-256"


def _sha256(content: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(content), _READ_BYTES):
        digest.update(content[start : start + _READ_BYTES])
    return digest.hexdigest()
