"""The 20-step runs whose losses are kept; `python -m tests.golden.curves` records them anew on this machine."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from tests.dist.runs import Case, train
from tests.pool import Pool

STEPS = 20
FILE = Path(__file__).with_name("curves.json")
CASES = {
    "stage1_reference_muon": Case(stage="distill", family="reference", optimizer="muon"),
    "stage1_cogvit_l_muon": Case(stage="distill", family="cogvit_l", optimizer="muon"),
    "stage2_cogvit_l_muon": Case(stage="contrast", family="cogvit_l", optimizer="muon"),
    "stage2_reference_adamw": Case(stage="contrast", family="reference", optimizer="adamw"),
}
Curves = dict[str, list[float]]  # loss and grad_norm of each step


@dataclass(frozen=True)
class Record:
    """The curves of one kind of machine."""

    machine: dict[str, str]
    curves: dict[str, Curves]  # by case; a kind of machine may not have run a newer one yet


def machine() -> dict[str, str]:
    """What the last bits of a result depend on beside the code."""
    models = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def run(pool: Pool, case: Case) -> Curves:
    """Losses and gradient norms of 20 steps."""
    trace = pool.run(train, world=1, args=(case, STEPS))[0]
    return {"loss": trace.losses, "grad_norm": trace.grad_norms}


def assert_close(actual: Curves, expected: Curves) -> None:
    """Compare the curves of two processors, which round differently; training amplifies it."""
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert actual["grad_norm"][:5] == pytest.approx(expected["grad_norm"][:5], rel=1e-3)


def read() -> list[Record]:
    """The records of all machines."""
    return [Record(**values) for values in json.loads(FILE.read_text())]


def write(record: Record) -> None:
    """Put a machine's record beside those of other machines that are still close to it."""
    kept = [record]
    for other in read():
        if other.machine == record.machine:
            continue
        try:
            for name in record.curves.keys() & other.curves.keys():
                assert_close(record.curves[name], other.curves[name])
        except AssertionError:
            print(f"dropped the record of {other.machine}, which differs by more than rounding")
        else:
            kept.append(other)
    FILE.write_text(json.dumps([asdict(one) for one in kept], indent=1) + "\n")


if __name__ == "__main__":
    workers = Pool()
    write(Record(machine(), {name: run(workers, case) for name, case in CASES.items()}))
