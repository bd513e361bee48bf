"""Every parameter gets its value from the source, or the start is refused."""

from __future__ import annotations

import pytest
import torch

from cogvit.errors import CheckpointError
from cogvit.model.init import init_tensor
from cogvit.parallel.convert import fill
from cogvit.parallel.mesh import start_mesh
from tests.dist.runs import Case, run_config, start_engine
from tests.pool import Pool


def fill_with_a_hole(rank: int, world: int, hole: str) -> str:
    mesh = start_mesh(run_config(Case()).parallel)
    engine, _ = start_engine(Case(stage="contrast"), mesh)

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == hole:
            return torch.full(shape, torch.nan)
        return init_tensor(name, shape, 0, 0.5)

    with pytest.raises(CheckpointError) as raised:
        fill(engine.model, mesh, source)
    return str(raised.value)


@pytest.mark.parametrize("hole", ["vision.norm.weight", "log_t"])
def test_a_parameter_without_a_value_is_named(pool: Pool, hole: str) -> None:
    assert pool.run(fill_with_a_hole, world=1, args=(hole,))[0].startswith(f"{hole} has no finite initial value")


def names_asked_for(rank: int, world: int) -> tuple[set[str], set[str]]:
    mesh = start_mesh(run_config(Case()).parallel)
    engine, _ = start_engine(Case(stage="contrast"), mesh)
    asked: set[str] = set()

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        asked.add(name)
        return init_tensor(name, shape, 0, 0.5)

    fill(engine.model, mesh, source)
    return asked, {tensor.name for tensor in engine.tensors}


def test_every_parameter_asks_the_source_once(pool: Pool) -> None:
    asked, owned = pool.run(names_asked_for, world=1)[0]
    assert asked == owned and len(owned) > 50
