"""Lists, verifies and describes the checkpoints of a run.

usage: python -m tools.checkpoint {list,verify,show} RUN

list    each checkpoint with its size and what the run had seen by then; nothing is verified
verify  read every file and compare it with its recorded SHA-256; exit status 1 when a checkpoint is damaged
show    the newest good checkpoint: the counters and the stored tensors, by module and kind
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from cogvit.arguments import run_command
from cogvit.errors import CheckpointError, ConfigError
from cogvit.training.checkpoint import list_checkpoints, read_state, verify
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
    if not list_checkpoints(Path(arguments.run) / "checkpoints"):
        raise CheckpointError(f"{arguments.run} has no checkpoint; pass a run directory")
    return actions[arguments.action](Path(arguments.run))


def list_run(run: Path) -> int:
    """Print a line for each checkpoint."""
    checkpoints = list_checkpoints(run / "checkpoints")
    states = {path: _state(path) for path in checkpoints}
    best = {state.best_step for state in states.values() if state is not None} - {None}
    for path, state in states.items():
        size_mb = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        seen = "damaged" if state is None else f"{state.images:,} images, {state.tokens:,} tokens seen"
        mark = "  (best by evaluation)" if state is not None and state.step in best else ""
        print(f"{path.name}  {size_mb:,.1f} MB  {seen}{mark}")
    return 0
