"""A run's directories: whether this start may use them, what it leaves there, and how progress is kept from harm.

A run that has made progress is never begun anew unless that is asked for, and then what it left is moved aside.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from cogvit.config import RunConfig, read_config, to_json
from cogvit.config.recipe import Difference, files_of
from cogvit.errors import ConfigError
from cogvit.training.checkpoint import folder_in, list_checkpoints
from cogvit.training.folder import Folder
from cogvit.training.identity import PLANNED, Identity, identity_of, read_identity, write_identity
from cogvit.training.lock import check_free, run_lock
from cogvit.training.optim import Module, lr_at, module_schedule

_CONFIG, _METRICS, _NEWEST = "config.json", "metrics.jsonl", "newest_checkpoint"
_CHANGES = "changes.jsonl"  # in OUT/logs: what differs from the start before
# What a start that begins anew must not find; its logs and its lock may stay.
_LEFT = (_CONFIG, "identity.json", _METRICS, "teacher_stats.safetensors", "ledger.jsonl", "checkpoints")
_LEFT_LOGS = (_NEWEST, "chrono.json", "spikes.jsonl", _CHANGES, "wandb_id")


@dataclass(frozen=True)
class Start:
    """A start of a run, as its directories are asked for it."""

    config: RunConfig  # with paths as `placed` has them
    compare: Callable[[RunConfig, RunConfig], list[Difference]]  # what makes the second another run than the first
    plan_hash: str  # of its data
    begin_anew: bool = False

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.config.out)

    @property
    def checkpoints(self) -> Folder:
        """Where its checkpoints lie."""
        return folder_in(self.out, self.config.checkpoint)


def placed(config: RunConfig) -> RunConfig:
    """Return the configuration with a relative --checkpoint.dir as the absolute path that the first start gave it.

    So that it means one place, whatever directory a later start is in.
    """
    given = config.checkpoint.dir
    if not given or not Folder(given).is_local or "://" in given or os.path.isabs(given):
        return config
    settled = os.path.abspath(given)
    try:
        before = read_config((Path(config.out) / _CONFIG).read_bytes()).checkpoint.dir
    except (OSError, ConfigError):
        before = ""
    if before.endswith("/" + os.path.normpath(given)):
        settled = before
    return replace(config, checkpoint=replace(config.checkpoint, dir=settled))


def check_claim(start: Start) -> None:
    """Look whether `claimed_directory` would accept a start, and touch nothing. Errors: as that."""
    if start.config.out:
        _accepted(start)
        check_free(start.out)


@contextmanager
def claimed_directory(start: Start, *, writer: bool) -> Iterator[None]:
    """Make the run directory, or accept it as the same run's; the writer locks it for the length of the block.

    Errors: ConfigError when it is another run's, is in use, cannot be written, or has made progress whose checkpoints
    are gone.
    """
    if not start.config.out:
        raise ConfigError("--out DIR is needed: the run directory")
    _accepted(start)
    with ExitStack() as stack:
        if writer:
            try:
                (start.out / "logs").mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_lock(start.out))
                changes = _accepted(start)  # the run that held the lock may have got on
                if start.begin_anew:
                    _move_aside(start)
                _leave(start, Folder(str(start.out)), start.config, goes_on=_has_progress(start.out, start.config))
                _record(start.out / "logs" / _CHANGES, changes)
            except OSError as error:
                raise ConfigError(f"--out {start.config.out} cannot be written: {error.strerror}") from None
        yield


@contextmanager
def claimed_checkpoints(start: Start) -> Iterator[None]:
    """Leave the configuration in --checkpoint.dir, if there is one, or accept what lies there as the same run's.

    On a disk it is locked for the length of the block; an object store has no locks. Errors: ConfigError when it is
    another run's, by its recipe or its --out, or in use: its checkpoints would be resumed from and removed.
    """
    if not start.config.checkpoint.dir:
        yield
        return
    folder = start.checkpoints
    # One file must not be locked twice: the kernel would free it at the end of either.
    lockable = folder.is_local and os.path.realpath(folder.path) != os.path.realpath(start.out)
    with run_lock(Path(folder.path), flag="--checkpoint.dir") if lockable else nullcontext():
        _check_owner(start, folder)
        yield


def _check_owner(start: Start, folder: Folder) -> None:
    """Compare the run with the configuration in its --checkpoint.dir, and leave it there."""
    mine = replace(start.config, out=os.path.abspath(start.config.out))
    owner, goes_on = _owner(folder), bool(list_checkpoints(folder))
    if owner is not None:
        if goes_on:
            _judged(start, owner, folder, "--checkpoint.dir")
        if os.path.realpath(owner.out) != os.path.realpath(mine.out):
            raise ConfigError(
                f"{folder} holds the checkpoints of --out {owner.out}, and this is --out {mine.out}; choose another "
                f"--checkpoint.dir, or remove {folder}/config.json if it is the same run, moved or renamed"
            )
    _leave(start, folder, mine, goes_on=goes_on)


def _accepted(start: Start) -> list[Difference]:
    """Return what a start changes of the run in its directory. Errors: ConfigError when it may not start there."""
    folder = Folder(str(start.out))
    owner = _owner(folder, flag="--out")
    if start.begin_anew:
        return []
    changes = _judged(start, owner, folder, "--out") if owner is not None and _has_progress(start.out, owner) else []
    newest = _read(start.out / "logs" / _NEWEST)
    if newest and not list_checkpoints(start.checkpoints):
        was = start.checkpoints if owner is None else folder_in(start.out, owner.checkpoint)
        told = "" if str(was) == str(start.checkpoints) else f" (they were in {was})"
        raise ConfigError(
            f"{start.out} has saved {newest}, and {start.checkpoints} holds no checkpoint{told}; bring them back, name"
            f" their place by --checkpoint.dir, or pass --begin-anew, which moves {_METRICS} and what else is left"
            " aside"
        )
    return changes


def _has_progress(out: Path, owner: RunConfig) -> bool:
    """Whether a run has trained: only then is its directory taken."""
    metrics = out / _METRICS
    if (metrics.is_file() and metrics.stat().st_size) or (out / "logs" / _NEWEST).exists():
        return True
    return bool(list_checkpoints(folder_in(out, owner.checkpoint)))


def _owner(folder: Folder, flag: str = "--checkpoint.dir") -> RunConfig | None:
    """Return the configuration in a directory. Errors: ConfigError when a file of that name is something else."""
    try:
        return read_config(folder.read(_CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{flag} {folder} holds something else: {folder}/{_CONFIG} is not of a run of this version: {reason};"
            f" choose another {flag}"
        ) from None


def _judged(start: Start, owner: RunConfig, folder: Folder, flag: str) -> list[Difference]:
    """Return the differences that leave a run the same. Errors: ConfigError names those that do not."""
    found = [one for one in start.compare(owner, start.config) if one.field != "checkpoint.dir"]
    named = [one for one in found if one.field in PLANNED or one.field in files_of(start.config)]
    before = read_identity(folder) if named else {}
    now = identity_of(start.config, start.plan_hash, [one.field for one in named])
    same = [one for one in named if before.get(one.field, "") == now.get(one.field)]
    refused = [str(one) + (", of other content" if one in named else "") for one in found if one not in same]
    if longer := next((one for one in found if one.field == "schedule.steps"), None):
        step = _last_step(start, owner)
        if _rates_agree(owner, start.config, step):
            refused.remove(str(longer))
            same.append(longer)
        elif len(refused) == 1:
            raise ConfigError(
                f"{folder} has trained {step} steps of a {owner.schedule.kind} schedule over {longer.before}, and over"
                f" {longer.after} their rates would have been others; start from its weights (--init {start.out}) in"
                " another --out; a run can be made longer with --schedule.kind constant, or wsd before its decay"
            )
    if refused:
        raise ConfigError(f"{folder} holds another run ({'; '.join(refused[:3])}); choose another {flag}")
    return same


def _last_step(start: Start, owner: RunConfig) -> int:
    folders = list_checkpoints(start.checkpoints) or list_checkpoints(folder_in(start.out, owner.checkpoint))
    return int(folders[-1].name.removeprefix("step_")) if folders else 0


def _rates_agree(old: RunConfig, new: RunConfig, steps: int) -> bool:
    """Whether the first steps of two runs have the same learning rates in every module."""
    for module in get_args(Module):
        schedules = [module_schedule(module, run.optim, run.schedule) for run in (old, new)]
        if any(lr_at(schedules[0], step) != lr_at(schedules[1], step) for step in range(steps)):
            return False
    return True


def _leave(start: Start, folder: Folder, config: RunConfig, *, goes_on: bool) -> None:
    """Write what a later start recognizes the run by, each file in one move, for other ranks may be reading it.

    A run that goes on keeps the hashes that it began with.
    """
    before: Identity = read_identity(folder) if goes_on else {}
    found = identity_of(start.config, start.plan_hash, files_of(config).keys() - before.keys())
    write_identity(folder, found | before)
    folder.write(_CONFIG, (json.dumps(to_json(config), indent=1) + "\n").encode())


def _record(path: Path, changes: list[Difference]) -> None:
    with path.open("a") as file:
        for one in changes:
            row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "field": one.field}
            file.write(json.dumps(row | {"before": one.before, "after": one.after}) + "\n")


def _move_aside(start: Start) -> None:
    """Move what a run has left into OUT/before_N, and its checkpoints elsewhere into such a folder beside them."""
    moves = [(start.out / name, name) for name in _LEFT]
    moves += [(start.out / "logs" / name, f"logs/{name}") for name in _LEFT_LOGS]
    _move(start.out, moves)
    folder = start.checkpoints
    if not start.config.checkpoint.dir:
        return
    left = [*folder.folders(), *folder.sizes()]
    steps = [name for name in left if name.startswith("step_") or name in (_CONFIG, "identity.json", "best.json")]
    if steps and not folder.is_local:
        raise ConfigError(f"--begin-anew does not move what lies in {folder}; choose another --checkpoint.dir")
    _move(Path(folder.path), [(Path(folder.path) / name, name) for name in steps])


def _move(directory: Path, moves: list[tuple[Path, str]]) -> None:
    number = 1
    while (aside := directory / f"before_{number}").exists():
        number += 1
    moves = [(path, name) for path, name in moves if path.exists()]
    for path, name in moves:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside / name)
    if moves:
        print(f"begins anew; what {directory} held is in {aside}", flush=True)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
