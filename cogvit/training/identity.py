"""What a run is made of, by content: the same bytes make the same run wherever they lie and however that is spelt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from cogvit.config import RunConfig
from cogvit.config.recipe import files_of
from cogvit.training.checkpoint import folder_of, list_checkpoints
from cogvit.training.folder import Folder

IDENTITY = "identity.json"  # beside config.json: field -> hash
PLANNED = ("data.shards", "rl.tasks", "rl.judge")  # fields that the plan's hash is of
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")

Identity = dict[str, str]  # field -> hash of what it names; nothing for what is known by its name alone


def identity_of(config: RunConfig, plan_hash: str, fields: Iterable[str] | None = None) -> Identity:
    """Hash what a run is made of, or of it the fields that are asked for.

    plan_hash: of the images of its shards, or of its prompts.
    """
    found = dict.fromkeys(PLANNED, plan_hash)
    for field, path in files_of(config).items():
        if fields is None or field in fields:
            digest = _hash_of(Path(path), weights=field != "data.tokenizer")
            found |= {field: digest} if digest else {}
    return found


def read_identity(folder: Folder) -> Identity:
    """Return what a start has left beside the configuration; nothing where it is missing or damaged."""
    try:
        found = json.loads(folder.read(IDENTITY))
    except (OSError, ValueError):
        return {}
    return {str(field): str(digest) for field, digest in found.items()} if isinstance(found, dict) else {}


def write_identity(folder: Folder, identity: Identity) -> None:
    """Leave it beside the configuration."""
    folder.write(IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())


def _hash_of(path: Path, *, weights: bool) -> str:
    """Return the hash of a file, of a directory's files, or of a run's newest checkpoint; "" for a name of the hub.

    weights: whether a directory's weights count, which do not change how text is cut into tokens.
    """
    if path.is_file():
        return _digest([path], path.parent)
    if not path.is_dir():
        return ""
    checkpoints = list_checkpoints(folder_of(path))
    if checkpoints:
        return hashlib.sha256(checkpoints[-1].read("manifest.json")).hexdigest()
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return _digest((file for file in files if weights or file.suffix not in _WEIGHTS), path)


def _digest(files: Iterable[Path], above: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(above)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
