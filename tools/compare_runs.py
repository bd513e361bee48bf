"""Compares two runs to the bit and says where they part first.

usage: python -m tools.compare_runs A B

Compared are the metrics of every step that both runs recorded, without clocks, speeds and the filling of packs, and the
tensors and counters of every checkpoint that both hold. Layouts may differ: checkpoints hold whole tensors.
Exit status: 0 when everything is equal and the runs are equally long, 1 when they part, 2 when they cannot be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvit.config import load_config
from cogvit.config.arguments import run_command
from cogvit.errors import CheckpointError, ConfigError
from cogvit.stages import recipe_differences
from cogvit.training.checkpoint import folder_of, list_checkpoints, read_state, read_tensors, stored_shapes
from cogvit.training.folder import Folder
from cogvit.training.manifest import verify
from cogvit.training.meter import read_metrics

_PRINTED = 12  # differences of one step that are printed


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    a: str
    b: str


@dataclass(frozen=True)
class Difference:
    """One thing that is not equal after a step."""

    step: int
    what: str  # metric, counter or KIND/TENSOR
    detail: str


@dataclass(frozen=True)
class Comparison:
    """What was compared of one kind, and the differences at the first step that has any."""

    steps: tuple[int, ...]  # that both runs have
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    differences: tuple[Difference, ...]


def compare_metrics(a: Path, b: Path) -> Comparison:
    """Compare metrics.jsonl of two runs. Errors: DataError when a file is missing or damaged."""
    rows_a, rows_b = ({int(row["step"]): row for row in read_metrics(run / "metrics.jsonl")} for run in (a, b))

    def differing(step: int) -> Iterator[Difference]:
        return _differing(step, *(_without_clocks(rows[step]) for rows in (rows_a, rows_b)))

    return _compare(set(rows_a), set(rows_b), differing)


def compare_checkpoints(a: Path, b: Path) -> Comparison:
    """Compare the checkpoints of two runs, tensor by tensor; memory: one tensor of each with its moments.

    Errors: CheckpointError when one that both runs have is damaged.
    """
    found_a, found_b = ({_step_of(path): path for path in list_checkpoints(folder_of(run))} for run in (a, b))

    def differing(step: int) -> Iterator[Difference]:
        paths = found_a[step], found_b[step]
        for path in paths:
            if fault := verify(path):
                raise CheckpointError(f"{path} is damaged: {fault}; repair or remove it")
        yield from _differing(step, *(_without_clocks(asdict(read_state(path))) for path in paths))
        yield from _differing_tensors(step, *paths)

    return _compare(set(found_a), set(found_b), differing)


def compare_runs(arguments: Arguments) -> int:
    """Print where two runs part; returns the exit status."""
    a, b = Path(arguments.a), Path(arguments.b)
    for run in (a, b):
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"{run} is not a run directory: it has no metrics.jsonl")
    print(f"A = {a}\nB = {b}")
    for line in recipe_differences(*(load_config(run / "config.json") for run in (a, b))):
        print(f"configured differently: {line}")
    metrics, checkpoints = compare_metrics(a, b), compare_checkpoints(a, b)
    if not metrics.steps and not checkpoints.steps:
        raise ConfigError(f"{a} and {b} share neither a recorded step nor a checkpoint; there is nothing to compare")
    _print("metrics", metrics)
    _print("checkpoints", checkpoints)
    partings = [found.differences[0] for found in (metrics, checkpoints) if found.differences]
    if partings:
        first = min(partings, key=lambda difference: difference.step)
        print(f"they part first at step {first.step}: {first.what} ({first.detail})")
        return 1
    if metrics.only_a or metrics.only_b:
        shorter, last = ("B", metrics.only_a) if metrics.only_a else ("A", metrics.only_b)
        print(f"equal as far as both go; {shorter} lacks {len(last)} steps, the first is {last[0]}")
        return 1
    print("identical to the bit in all that was compared")
    return 0


def _compare(steps_a: set[int], steps_b: set[int], differing: Callable[[int], Iterator[Difference]]) -> Comparison:
    shared = sorted(steps_a & steps_b)
    found = next((differences for step in shared if (differences := tuple(differing(step)))), ())
    return Comparison(tuple(shared), tuple(sorted(steps_a - steps_b)), tuple(sorted(steps_b - steps_a)), found)


def _differing(step: int, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare two sets of values by how they are written: nan equals nan, and 0.0 is not -0.0."""
    for name in [*a, *(name for name in b if name not in a)]:
        in_a, in_b = (repr(values[name]) if name in values else "absent" for values in (a, b))
        if in_a != in_b:
            yield Difference(step, name, f"A {in_a}, B {in_b}")


def _differing_tensors(step: int, a: Folder, b: Folder) -> Iterator[Difference]:
    shapes_a, shapes_b = stored_shapes(a), stored_shapes(b)
    shared = [key for key, shape in shapes_a.items() if shapes_b.get(key) == shape]
    yield from _differing(step, *({key: s[key] for key in s.keys() - set(shared)} for s in (shapes_a, shapes_b)))
    shared.sort(key=_name_of)
    for _, keys in groupby(shared, key=_name_of):  # a weight with its moments
        names = list(keys)
        in_a, in_b = read_tensors(a, names), read_tensors(b, names)
        for name in names:
            if detail := _difference_of(in_a[name], in_b[name]):
                yield Difference(step, name, detail)


def _difference_of(a: Tensor, b: Tensor) -> str:
    """Say how two fp32 tensors of one shape differ in their bits; nothing where they do not."""
    unequal = a.view(torch.int32) != b.view(torch.int32)
    count = int(unequal.sum())
    if not count:
        return ""
    return f"{count:,} of {a.numel():,} values, by up to {float((a - b).abs().max()):.3g}"


def _without_clocks(values: Mapping[str, Any]) -> dict[str, Any]:
    machine = ("_s", "seconds", "valid_fraction", "chrono")
    return {name: value for name, value in values.items() if not name.endswith(machine)}


def _name_of(key: str) -> str:
    """NAME of KIND/NAME."""
    return key.partition("/")[2]


def _step_of(path: Folder) -> int:
    return int(path.name.removeprefix("step_"))


def _print(kind: str, found: Comparison) -> None:
    lone = "".join(
        f", {len(steps)} only in {run}" for run, steps in (("A", found.only_a), ("B", found.only_b)) if steps
    )
    if not found.steps:
        print(f"{kind}: none of the same step{lone}")
        return
    print(f"{kind}: {len(found.steps)} of the same step ({found.steps[0]} to {found.steps[-1]}){lone}")
    for difference in found.differences[:_PRINTED]:
        print(f"  step {difference.step}  {difference.what}: {difference.detail}")
    if len(found.differences) > _PRINTED:
        print(f"  and {len(found.differences) - _PRINTED} more at this step")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, compare_runs))
