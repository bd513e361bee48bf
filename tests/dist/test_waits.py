"""How often a step makes the host wait for the device: never for a microbatch, and a few times for all of it.

Counted on CPU: every operation whose result the host would have to ask a GPU for. On a GPU a step ends with one wait
more, for its own end; the look at equal captions (`sigmoid.agreements`) is only taken on CPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvit.batch import DataPosition, StepBatch
from cogvit.parallel.mesh import start_mesh
from cogvit.training.loop import advance
from cogvit.training.signals import StopRequest
from cogvit.training.state import TrainState
from tests.dist.runs import Case, run_config, start_engine
from tests.packs import random_batch
from tests.pool import Pool

BUDGET = 5 - 1
ONLY_ON_CPU = "sigmoid.py"
WAITS = ("aten._local_scalar_dense", "aten.nonzero.", "aten.bincount", "aten.equal", "aten.unique", "aten._unique")
Places = Counter[str]


class Waits(TorchDispatchMode):
    """Counts them by place."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Places = Counter()

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        name = Path(frames[-1].filename).name
        if name != ONLY_ON_CPU:
            self.places[f"{name}:{frames[-1].lineno}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = str(func), args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if name.startswith(WAITS) or (name.startswith(("aten.index.", "aten.index_put")) and by_mask):
            self.note()
        return func(*args, **(kwargs or {}))


def count(rank: int, world: int, case: Case, num_micro: int) -> Places:
    """The second step's waits on this rank."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    micro = tuple(random_batch(seed + 10 * rank, case.teacher_dims) for seed in range(num_micro))
    position, stop, waits = DataPosition("plan", 1), StopRequest(), Waits()
    state, source = TrainState(0, position, 0, 0), iter([StepBatch(micro, position)] * 2)
    state, _, _ = advance(engine, objective, source, state)
    listed = torch.Tensor.tolist

    def tolist(self: Tensor) -> Any:  # which on a CPU is no operation
        waits.note()
        return listed(self)

    torch.Tensor.tolist = tolist  # type: ignore[method-assign]
    with waits:
        advance(engine, objective, source, state)
        stop.agreed(mesh.agree_max)
    torch.Tensor.tolist = listed  # type: ignore[method-assign]
    return waits.places


@pytest.mark.parametrize("stage", ["distill", "contrast"])
@pytest.mark.parametrize(
    ("world", "family"),
    [
        pytest.param(1, "reference", marks=pytest.mark.long),
        pytest.param(1, "cogvit_l", marks=pytest.mark.long),
        (2, "cogvit_l"),
    ],
)
def test_a_step_waits_a_few_times_and_a_microbatch_never(pool: Pool, stage: str, world: int, family: str) -> None:
    case = Case(stage=stage, family=family, world=world, optimizer="muon", summary=stage == "distill")
    two, four = (pool.run(count, world, (case, num_micro))[0] for num_micro in (2, 4))
    assert two == four
    assert 1 <= two.total() <= BUDGET, two
