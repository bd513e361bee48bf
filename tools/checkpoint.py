"""Lists, verifies and describes the checkpoints of a run.

usage: python -m tools.checkpoint {list,verify,show} RUN

list    each checkpoint with its size and what the run had seen by then; nothing is verified
verify  read every file and compare it with its recorded SHA-256; exit status 1 when a checkpoint is damaged
show    the newest good checkpoint: the counters and the stored tensors, by module and kind
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cogvit.config.arguments import run_command
from cogvit.errors import CheckpointError, ConfigError
from cogvit.training.checkpoint import folder_of, list_checkpoints, read_state, stored_shapes
from cogvit.training.folder import Folder
from cogvit.training.manifest import verify
from cogvit.training.restore import latest_of_run


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    action: str
    run: str


def inspect(arguments: Arguments) -> int:
    """Print what the action asks for; returns the exit status."""
    actions = {"list": list_run, "verify": verify_run, "show": show_run}
    if arguments.action not in actions:
        raise ConfigError(f"unknown action {arguments.action!r}; actions are {', '.join(actions)}")
    if not list_checkpoints(folder_of(Path(arguments.run))):
        raise CheckpointError(f"{arguments.run} has no checkpoint; pass a run directory")
    return actions[arguments.action](Path(arguments.run))


def list_run(run: Path) -> int:
    """Print a line for each checkpoint."""
    for path in list_checkpoints(folder_of(run)):
        size_mb = sum(path.sizes().values()) / 1e6
        print(f"{path.name}  {size_mb:,.1f} MB  {_progress(path)}")
    return 0


def verify_run(run: Path) -> int:
    """Read every checkpoint and print what is wrong with it."""
    faults = 0
    for path in list_checkpoints(folder_of(run)):
        fault = verify(path)
        faults += fault is not None
        print(f"{path.name}  {'good' if fault is None else 'DAMAGED: ' + fault}", flush=True)
    return 1 if faults else 0


def show_run(run: Path) -> int:
    """Print what the newest good checkpoint holds."""
    path = latest_of_run(run)
    state = read_state(path)
    print(f"{path}\n{_progress(path)}, {state.chrono.step_s:,.0f} s in steps, goodput {state.chrono.goodput:.1%}")
    if state.best_step is not None:
        print(f"best evaluation so far: loss {state.best_loss:.6g} at step {state.best_step}")
    tensors, values = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for key, shape in stored_shapes(path).items():
        kind, _, name = key.partition("/")
        part = (name.partition(".")[0], kind)
        tensors[part] += 1
        values[part] += prod(shape)
    print(f"{'module':<14}{'kind':<14}{'tensors':>8}{'values':>16}")
    for module, kind in sorted(tensors):
        print(f"{module:<14}{kind:<14}{tensors[module, kind]:>8}{values[module, kind]:>16,}")
    return 0


def _progress(path: Folder) -> str:
    try:
        state = read_state(path)
    except (OSError, ValueError, KeyError, TypeError):
        return "its counters cannot be read; see verify"
    return f"step {state.step:,}, {state.images:,} images and {state.tokens:,} tokens seen"


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, inspect))
