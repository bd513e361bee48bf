"""The 20-step runs whose losses are kept; `python -m tests.golden.curves` records them anew."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from tests.dist.runs import Case, train
from tests.pool import Pool

STEPS = 20
RECORD = Path(__file__).with_name("curves.json")
CASES = {
    "stage1_reference_muon": Case(stage="distill", family="reference", optimizer="muon"),
    "stage1_cogvit_l_muon": Case(stage="distill", family="cogvit_l", optimizer="muon"),
    "stage2_cogvit_l_muon": Case(stage="contrast", family="cogvit_l", optimizer="muon"),
    "stage2_reference_adamw": Case(stage="contrast", family="reference", optimizer="adamw"),
}


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


def curves(pool: Pool, case: Case) -> dict[str, list[float]]:
    """Losses and gradient norms of 20 steps."""
    trace = pool.run(train, world=1, args=(case, STEPS))[0]
    return {"loss": trace.losses, "grad_norm": trace.grad_norms}


def record() -> dict[str, Any]:
    """Everything that curves.json holds."""
    pool = Pool()
    return {"machine": machine(), "curves": {name: curves(pool, case) for name, case in CASES.items()}}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")
