"""Checkpoints: plain tensors under plain names in torch.distributed.checkpoint files, so any layout loads any other.

A save copies the tensors and returns; a thread writes them, and a manifest with sizes and SHA-256 last. The manifest is
what makes them a checkpoint, on a disk and in an object store alike: no directory needs to be renamed. The latest
checkpoint is the highest step whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from cogvit.config import CheckpointConfig
from cogvit.errors import CheckpointError
from cogvit.training.folder import Folder
from cogvit.training.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    another_version,
    dealt,
    fault_of,
    joined,
    read_manifest,
    verify,
)
from cogvit.training.optim import MASTER
from cogvit.training.passing import pass_on
from cogvit.training.state import TrainState, state_from_json, state_to_json
from cogvit.training.storage import (
    METADATA,
    Digests,
    PartReader,
    SafeReader,
    Written,
    write_metadata,
    write_parts,
)
from cogvit.training.together import Together, turn_of

if TYPE_CHECKING:  # so that reading weights needs neither megatron nor deepspeed
    from cogvit.parallel.mesh import Mesh
    from cogvit.training.engine import Engine
    from cogvit.training.zero import Fragment

_BEST, _PROBE = "best.json", ".writable"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; making one is collective over all ranks.

    The context's end waits for the save under way. newest: a file that gets the name of each checkpoint once it is
    there, for scripts that cannot look into an object store. Errors: CheckpointError when the folder cannot be written.
    """

    def __init__(self, folder: Folder, mesh: Mesh, config: CheckpointConfig, newest: Path) -> None:
        self._folder, self._mesh, self._config, self._newest = folder, mesh, config, newest
        mesh.from_writer(lambda: _try_to_write(folder))
        self._together = Together(mesh.rank, mesh.world_size)
        self._turn = turn_of(mesh.rank, mesh.gather(socket.gethostname()), shared=folder.is_local)
        self.bytes_read = 0  # by this rank, of the checkpoint it resumed from
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._newest_step: int | None = None  # saved or resumed from
        self._saved_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._together.give_up()
        self._thread.shutdown()
        self._together.close()

    def due(self, step: int) -> bool:
        """Whether a step ends with a save; collective where saves go by the clock, which ranks read apart."""
        by_steps = self._config.every_steps > 0 and step % self._config.every_steps == 0
        if by_steps or self._config.every_minutes == 0:
            return by_steps
        minutes = (time.monotonic() - self._saved_s) / 60
        return self._mesh.agree_max(int(minutes >= self._config.every_minutes)) > 0

    def save(self, state: TrainState, engine: Engine) -> None:
        """Copy the run's state and begin to write it, unless that was done; collective over all ranks.

        Waits for the save before this one first; one that failed (a full disk) is told as a warning, and training goes
        on with the checkpoints that are there. Memory on the CPU: a copy of this rank's partition.
        """
        if state.step == self._newest_step:
            return
        try:
            self.finish()
        except CheckpointError as error:
            if self._mesh.is_writer:
                _log.warning("%s; the checkpoints before it are kept and training goes on", error)
        self._newest_step, self._saved_s = state.step, time.monotonic()
        self._under_way = self._thread.submit(self._write, engine, engine.snapshot(), state)

    def finish(self) -> None:
        """Wait until the save under way is on disk. Errors: CheckpointError on every rank when it was not written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest good checkpoint into the engine; None when the run has none. Collective over all ranks.

        Errors: CheckpointError when there are checkpoints and none can be used: to begin anew would remove them.
        """
        candidates = self._mesh.from_writer(lambda: [path.name for path in reversed(list_checkpoints(self._folder))])
        for name in candidates:
            state = self._resume_from(self._folder / name, engine)
            if state is not None:
                return state
        if candidates:
            listed = ", ".join(reversed(candidates))
            raise CheckpointError(
                f"none of {self._folder}'s checkpoints ({listed}) is whole; repair one, or remove all to begin anew"
            )
        return None

    def _resume_from(self, path: Folder, engine: Engine) -> TrainState | None:
        """Load one checkpoint, each file verified by one rank; None, with a warning, where it is not whole."""

        def opened() -> tuple[str, Digests, bytes]:
            fault, files = read_manifest(path)
            if foreign := another_version(path):
                raise CheckpointError(_refusal(path, foreign))
            return fault, files, b"" if fault else path.read(METADATA)

        fault, files, metadata = self._mesh.from_writer(opened)
        reader, error = None, None
        if not fault:
            try:
                reader = PartReader(path, metadata)
                mine = [one for rank, one in dealt(files, self._mesh.world_size) if rank == self._mesh.rank]
                fault = next((found for one in mine if (found := fault_of(one, reader))), "")
            except CheckpointError as found:
                error = found
            self._mesh.raise_together(error)
            if self._mesh.agree_max(int(bool(fault))):
                fault = next(found for found in self._mesh.gather(fault) if found)
        if fault:
            if self._mesh.is_writer:
                _log.warning("%s is not used: %s", path, fault)
            return None
        assert reader is not None
        self._load(path, reader, files, engine)
        engine.zero.share_parameters()
        self.bytes_read = reader.bytes_read
        state = self._mesh.from_writer(lambda: read_state(path))
        engine.zero.load_update_count(state.step - state.skipped)
        self._newest_step = state.step
        return state

    def _load(self, path: Folder, reader: PartReader, files: Digests, engine: Engine) -> None:
        """Put the engine's state together from what all ranks have read.

        Errors: CheckpointError on every rank when it does not fit on any.
        """

        def expect() -> None:
            for part in engine.parts_here():
                reader.expect(part)

        def attempt(work: Callable[[], None]) -> None:
            error = None
            try:
                work()
            except CheckpointError as found:
                error = CheckpointError(f"{path} does not hold this model: {found}")
            self._mesh.raise_together(error)

        attempt(expect)
        pass_on(reader, dealt(files, self._mesh.world_size), self._mesh)
        attempt(lambda: engine.load_fragments(reader.read))

    def _write(self, engine: Engine, fragments: list[Fragment], state: TrainState) -> None:
        """Write a snapshot's file on every rank, then the manifest on one; runs in the thread."""
        target, turn = self._folder / step_name(state.step), self._turn
        name = f"__{turn.file}_0.distcp"

        def write() -> tuple[str, list[Written], dict[str, Any]]:
            parts = engine.parts_of(fragments)
            places, entry = self._together.in_turn(
                turn, lambda: write_parts(target, name, parts, begins=turn.begins, ends=turn.ends)
            )
            return name, places, entry

        def publish(answers: list[tuple[str, list[Written], dict[str, Any]]]) -> None:
            files = joined((name, entry) for name, _, entry in answers)
            files |= write_metadata(target, (place for _, places, _ in answers for place in places))
            content = json.dumps(state_to_json(state)).encode()
            target.write(STATE, content)
            files[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest = {"format": FORMAT, "step": state.step, "files": files}
            target.write(MANIFEST, json.dumps(manifest, indent=1).encode())

        try:
            # What a save that was cut off, or damage, left under this name goes first.
            self._together.run(_nothing, lambda _: _discard(target))
            self._together.run(write, publish)
        except CheckpointError as error:
            reason = _reason(error)
            if self._folder.is_local:  # a full disk hides behind other errors
                free_mb = shutil.disk_usage(self._folder.path).free / 1e6
                reason = f"{free_mb:,.1f} MB are free there{': ' if reason else ''}{reason}"
            if self._mesh.is_writer:
                with suppress(OSError, CheckpointError):
                    _discard(target)  # on a full disk it would stand in the way of the next one
            raise CheckpointError(f"checkpoint {target} could not be written, {reason}") from None
        # All ranks wait for that: one that went on would soon wait inside a step, where the deadline is of minutes.
        self._together.run(_nothing, lambda _: self._tell_and_prune(target, state))

    def _tell_and_prune(self, target: Folder, state: TrainState) -> None:
        """Say that a checkpoint is there and remove those before it that are not kept.

        What fails here is told and tried again after the next save: the checkpoint is good, and stays.
        """

        def tell_the_best() -> None:
            if state.best_step is not None:
                best = {"step": state.best_step, "loss": state.best_loss}
                self._folder.write(_BEST, json.dumps(best).encode())

        def discard(folder: Folder) -> Callable[[], None]:
            return lambda: _discard(folder)

        for work in (
            lambda: Folder(str(self._newest.parent)).write(self._newest.name, f"{target.name}\n".encode()),
            tell_the_best,
            *(discard(folder) for folder in self._to_discard(state)),
        ):
            try:
                work()
            except (OSError, CheckpointError) as error:
                _log.warning("%s is written, but %s", target, error)

    def _to_discard(self, state: TrainState) -> list[Folder]:
        """Return the checkpoints that are not kept, and what saves that were cut off left.

        One beyond this step was damaged, or the run would have resumed from it: it must not count among those kept.
        """
        keep_every = self._config.keep_every_steps
        steps = [step for step in map(_step_of, list_checkpoints(self._folder)) if step <= state.step]
        kept = {*steps[-self._config.keep_last :], *(step for step in steps if keep_every and step % keep_every == 0)}
        if state.best_step in steps:
            kept.add(state.best_step)
        folders = [self._folder / name for name in _step_folders(self._folder)]
        return [folder for folder in folders if _step_of(folder) not in kept]


def _reason(error: BaseException) -> str:
    """Return the last line of an error, unless it is a place in torch's sources, as of a stream that ended early."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    told = [line for line in lines if "[enforce fail" not in line and "unexpected pos" not in line]
    return told[-1] if told and lines[-1] in told else ""


def _nothing() -> None:
    """What ranks do that only wait for the writer."""


def _try_to_write(folder: Folder) -> None:
    try:
        folder.write(_PROBE, b"")
        folder.remove(_PROBE)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be written to {folder}: {error.strerror or error}") from None


def _discard(path: Folder) -> None:
    """Remove a checkpoint; its manifest first, so that what is left half-way is none."""
    path.remove(MANIFEST)
    path.remove()


def folder_in(run: Path, config: CheckpointConfig) -> Folder:
    """Return where a run puts its checkpoints: checkpoint.dir, or RUN/checkpoints."""
    return Folder(config.dir or str(run / "checkpoints"))


def folder_of(run: Path) -> Folder:
    """Return where a run has put its checkpoints, by its config.json if it has one, of whatever version."""
    try:
        configured = json.loads((run / "config.json").read_text())["checkpoint"]["dir"]
    except (OSError, ValueError, KeyError, TypeError):
        configured = ""
    return folder_in(run, CheckpointConfig(dir=configured))


def step_name(step: int) -> str:
    """step_00000012."""
    return f"step_{step:08d}"


def _step_of(folder: Folder) -> int:
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(folder: Folder) -> list[Folder]:
    """Return the finished checkpoints, oldest first; they are not verified."""
    return [folder / name for name in _step_folders(folder) if MANIFEST in (folder / name).sizes()]


def _step_folders(folder: Folder) -> list[str]:
    return [name for name in folder.folders() if re.fullmatch(r"step_\d+", name)]


def latest(folder: Folder) -> Folder | None:
    """Return the newest checkpoint whose manifest verifies, warning of each newer one that does not.

    Errors: CheckpointError when an object store does not answer, which is not the same as no checkpoint, and when one
    is of another version.
    """
    for path in reversed(list_checkpoints(folder)):
        fault = verify(path)
        if fault is None:
            return path
        if foreign := another_version(path):
            raise CheckpointError(_refusal(path, foreign))
        _log.warning("%s is not used: %s", path, fault)
    return None


def _refusal(path: Folder, foreign: str) -> str:
    return f"{path} cannot be used: {foreign}; go on with that version or choose another --out"


def read_state(path: Folder) -> TrainState:
    """Return the counters stored with a checkpoint."""
    return state_from_json(json.loads(path.read(STATE)))


def stored_shapes(path: Folder) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by KIND/NAME; KIND is MASTER or a moment of the optimizer."""
    stored = SafeReader(path).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(path: Folder, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return stored tensors by their keys (KIND/NAME); in this process alone.

    Errors: CheckpointError when the checkpoint does not hold one of them.
    """
    shapes = stored_shapes(path)
    full = {key: torch.empty(shapes.get(key, ())) for key in keys}
    _load(full, path)
    return full


def weights(path: Folder, prefix: str) -> dict[str, Tensor]:
    """Return the plain weights whose names begin with prefix, without it; in this process alone."""
    wanted = f"{MASTER}/{prefix}"
    full = read_tensors(path, (key for key in stored_shapes(path) if key.startswith(wanted)))
    return {key.removeprefix(wanted): tensor for key, tensor in full.items()}


def _load(full: dict[str, Tensor], path: Folder) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should
            load(full, storage_reader=SafeReader(path), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} does not hold this model: {reason}") from None
