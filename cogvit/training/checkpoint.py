"""Checkpoints: plain tensors under plain names in torch.distributed.checkpoint files, so any layout loads any other.

A save copies the tensors and returns; a thread writes them to a hidden directory, then a manifest with sizes and
SHA-256, and one rename makes it visible. The latest checkpoint is the highest step whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cogvit.config import CheckpointConfig
from cogvit.errors import CheckpointError
from cogvit.training.optim import MASTER
from cogvit.training.state import TrainState, state_from_json, state_to_json
from cogvit.training.storage import SafeReader

if TYPE_CHECKING:  # so that reading weights needs neither megatron nor deepspeed
    from cogvit.parallel.mesh import Mesh
    from cogvit.training.engine import Engine
    from cogvit.training.zero import Fragment

FORMAT = 2
_MANIFEST, _STATE, _BEST = "manifest.json", "state.json", "best.json"
_log = logging.getLogger(__name__)
Result = TypeVar("Result")
Digests = dict[str, dict[str, Any]]  # {"bytes": size, "sha256": digest} by file name


class Checkpoints:
    """The checkpoints of one run directory; making one is collective over all ranks.

    The context's end waits for the save under way.
    """

    def __init__(self, directory: Path, mesh: Mesh, config: CheckpointConfig) -> None:
        self._directory, self._mesh, self._config = directory, mesh, config
        directory.mkdir(parents=True, exist_ok=True)
        # Groups of its own, so that what the thread sends never meets what training sends.
        self._group = dist.new_group(backend="gloo")
        self._tp_group, self._dp_group = (mesh.new_axis_group(axis) for axis in ("tp", "dp"))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._newest_step: int | None = None  # saved or resumed from

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def due(self, step: int) -> bool:
        """Whether a step ends with a save."""
        return self._config.every_steps > 0 and step % self._config.every_steps == 0

    def save(self, state: TrainState, engine: Engine) -> None:
        """Copy the run's state and begin to write it, unless that was done; collective over all ranks.

        Waits for the save before this one first; one that failed (a full disk) is told as a warning, and training goes
        on with the checkpoints that are there. Memory on the CPU: a copy of this rank's partition, its share of the
        whole tensors to write, and one whole tensor at a time.
        """
        if state.step == self._newest_step:
            return
        try:
            self.finish()
        except CheckpointError as error:
            if self._mesh.is_writer:
                _log.warning("%s; the checkpoints before it are kept and training goes on", error)
        self._newest_step = state.step
        self._under_way = self._thread.submit(self._write, engine, engine.snapshot(), state)

    def finish(self) -> None:
        """Wait until the save under way is on disk. Errors: CheckpointError on every rank when it was not written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest good checkpoint into the engine; None when the run has none. Collective over all ranks."""
        path = self._mesh.from_writer(lambda: latest(self._directory))
        if path is None:
            return None

        def read(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
            full = {key: torch.empty(shape) for key, shape in shapes.items()}
            _load(full, path)
            return full

        engine.load_plain_state(read)
        state = read_state(path)
        engine.zero.load_update_count(state.step - state.skipped)
        self._newest_step = state.step
        return state

    def _write(self, engine: Engine, fragments: list[Fragment], state: TrainState) -> None:
        """Write a snapshot's files on every rank, then make it visible on one; runs in the thread."""
        final = step_directory(self._directory, state.step)
        partial = final.with_name(f".{final.name}.partial")

        def prepare() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def digest_own() -> Digests:
            return {file.name: _digest(file) for file in sorted(partial.glob(f"__{self._mesh.rank}_*"))}

        def publish() -> None:
            (partial / _STATE).write_text(json.dumps(state_to_json(state)))
            files = {name: entry for entries in digests for name, entry in entries.items()}
            files |= {name: _digest(partial / name) for name in (".metadata", _STATE)}
            manifest = {"format": FORMAT, "step": state.step, "files": files}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if state.best_step is not None:
                best = {"step": state.best_step, "loss": state.best_loss}
                (self._directory / _BEST).write_text(json.dumps(best))
            self._prune(state.best_step)

        try:
            self._on_writer(prepare)
            save(self._owned(engine, fragments), checkpoint_id=partial, process_group=self._group)
            digests = self._on_all(digest_own)
            self._on_writer(publish)
        except (CheckpointException, CheckpointError) as error:
            free_mb = shutil.disk_usage(self._directory).free / 1e6  # a full disk hides behind other errors
            if self._mesh.is_writer:
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would stand in the way of the next one
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"checkpoint {final.name} could not be written, {free_mb:,.1f} MB are free there: {reason}"
            ) from None

    def _owned(self, engine: Engine, fragments: list[Fragment]) -> dict[str, Tensor]:
        """The tensors this rank writes: a stage's tensors are dealt round-robin to its tp x dp ranks."""
        writers = self._mesh.tp_size * self._mesh.dp_size
        place = self._mesh.dp_rank * self._mesh.tp_size + self._mesh.tp_rank
        state = engine.plain_of(fragments, self._dp_group, self._tp_group)
        return {key: full.clone() for index, (key, full) in enumerate(state) if index % writers == place}

    def _on_writer(self, work: Callable[[], None]) -> None:
        self._on_all(work if self._mesh.is_writer else _nothing)

    def _on_all(self, work: Callable[[], Result]) -> list[Result]:
        """Run something on every rank; returns every rank's result. Errors: CheckpointError on all if one fails."""
        answers: list[Any] = [None] * self._mesh.world_size
        try:
            mine: tuple[Any, str] = (work(), "")
        except OSError as error:
            mine = (None, str(error))
        dist.all_gather_object(answers, mine, group=self._group)
        for _, fault in answers:
            if fault:
                raise CheckpointError(fault)
        return [result for result, _ in answers]

    def _prune(self, best_step: int | None) -> None:
        keep_every = self._config.keep_every_steps
        for old in list_checkpoints(self._directory)[: -self._config.keep_last]:
            step = int(old.name.removeprefix("step_"))
            if step != best_step and not (keep_every and step % keep_every == 0):
                shutil.rmtree(old)


def _nothing() -> None:
    """What the ranks that only wait for the writer do."""


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
    stored = SafeReader(path).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return stored tensors by their keys (KIND/NAME); in this process alone.

    Errors: CheckpointError when the checkpoint does not hold one of them.
    """
    shapes = stored_shapes(path)
    full = {key: torch.empty(shapes.get(key, ())) for key in keys}
    _load(full, path, alone=True)
    return full


def weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the plain weights whose names begin with prefix, without it; in this process alone."""
    wanted = f"{MASTER}/{prefix}"
    full = read_tensors(path, (key for key in stored_shapes(path) if key.startswith(wanted)))
    return {key.removeprefix(wanted): tensor for key, tensor in full.items()}


def _load(full: dict[str, Tensor], path: Path, *, alone: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `alone` asks for
            load(full, storage_reader=SafeReader(path), no_dist=alone)
    except (CheckpointException, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} does not hold this model: {reason}") from None


def _digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
