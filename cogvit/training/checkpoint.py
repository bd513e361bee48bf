"""Checkpoints: plain tensors under plain names in torch.distributed.checkpoint files, so any layout loads any other.

A save goes to a hidden directory; a manifest with sizes and SHA-256 is written last and one rename makes it visible.
The latest checkpoint is the highest step whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cogvit.errors import CheckpointError
from cogvit.training.optim import MASTER
from cogvit.training.state import TrainState, state_from_json, state_to_json

if TYPE_CHECKING:  # so that reading weights needs neither megatron nor deepspeed
    from cogvit.parallel.mesh import Mesh
    from cogvit.training.engine import Engine

FORMAT = 1
_MANIFEST, _STATE, _BEST = "manifest.json", "state.json", "best.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run directory."""

    directory: Path  # RUN/checkpoints
    mesh: Mesh
    every_steps: int
    keep_last: int

    def due(self, step: int) -> bool:
        """Whether a step ends with a save."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, state: TrainState, engine: Engine) -> Path:
        """Write the run's state; collective over all ranks."""
        final = step_directory(self.directory, state.step)
        partial = final.with_name(f".{final.name}.partial")
        if self.mesh.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        save(_owned(engine, self.mesh), checkpoint_id=partial)
        if self.mesh.is_writer:
            (partial / _STATE).write_text(json.dumps(state_to_json(state)))
            _write_manifest(partial, state.step)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._mark_best(state)
            self._prune(state.best_step)
        dist.barrier()
        return final

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest good checkpoint into the engine; None when the run has none. Collective over all ranks."""
        path = self.mesh.from_writer(lambda: latest(self.directory))
        if path is None:
            return None

        def read(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
            full = {key: torch.empty(shape) for key, shape in shapes.items()}
            _load(full, path)
            return full

        engine.load_plain_state(read)
        state = read_state(path)
        engine.zero.load_update_count(state.step)
        return state

    def _mark_best(self, state: TrainState) -> None:
        if state.best_step is not None:
            (self.directory / _BEST).write_text(json.dumps({"step": state.best_step, "loss": state.best_loss}))

    def _prune(self, best_step: int | None) -> None:
        for old in list_checkpoints(self.directory)[: -self.keep_last]:
            if best_step is None or old != step_directory(self.directory, best_step):
                shutil.rmtree(old)


def step_directory(directory: Path, step: int) -> Path:
    """RUN/checkpoints/step_00000012."""
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; they are not verified."""
    return sorted(path for path in directory.glob("step_*") if path.is_dir())


def latest(directory: Path) -> Path | None:
    """Return the newest checkpoint whose manifest verifies, warning of each newer one that does not."""
    for path in reversed(list_checkpoints(directory)):
        fault = verify(path)
        if fault is None:
            return path
        _log.warning("%s is not used: %s", path, fault)
    return None


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"its manifest cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            return f"{name} is missing or not {expected['bytes']} bytes long"
        if _sha256(file) != expected["sha256"]:
            return f"{name} does not have the recorded SHA-256"
    return None


def read_state(path: Path) -> TrainState:
    """Return the counters stored with a checkpoint."""
    return state_from_json(json.loads((path / _STATE).read_text()))


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by KIND/NAME; KIND is MASTER or a moment of the optimizer."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the plain weights whose names begin with prefix, without it; in this process alone."""
    wanted = f"{MASTER}/{prefix}"
    full = {key: torch.empty(shape) for key, shape in stored_shapes(path).items() if key.startswith(wanted)}
    _load(full, path, alone=True)
    return {key.removeprefix(wanted): tensor for key, tensor in full.items()}


def _load(full: dict[str, Tensor], path: Path, *, alone: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` asks for
            load(full, checkpoint_id=path, no_dist=alone)
    except (CheckpointException, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} does not hold this model: {reason}") from None


def _owned(engine: Engine, mesh: Mesh) -> dict[str, Tensor]:
    """The tensors this rank writes: a stage's tensors are dealt round-robin to its tp x dp ranks."""
    writers = mesh.tp_size * mesh.dp_size
    place = mesh.dp_rank * mesh.tp_size + mesh.tp_rank
    owned = {}
    for index, (key, full) in enumerate(engine.plain_state()):
        if index % writers == place:
            owned[key] = full.detach().cpu().clone()
    return owned


def _write_manifest(directory: Path, step: int) -> None:
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    (directory / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
