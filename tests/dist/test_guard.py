"""A NaN anywhere stops the step everywhere before the update, and is told with its rank, microbatch and samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cogvit.batch import Batch, SampleRef
from cogvit.config import GuardConfig
from cogvit.errors import NonFiniteStep
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.training.engine import Engine, StepReport
from tests.dist.runs import Case, micro_of, run_config, start_engine, whole_state
from tests.pool import Pool


def named(micro: tuple[Batch, ...], mesh: Mesh) -> tuple[Batch, ...]:
    """Give the images of each microbatch ids that say where they are."""
    return tuple(
        replace(batch, samples=tuple(SampleRef(100 * mesh.dp_rank + 10 * i + n, "", 0, 0) for n in range(2)))
        for i, batch in enumerate(micro)
    )


def poisoned(micro: tuple[Batch, ...], place: str) -> tuple[Batch, ...]:
    """Put one NaN into the second microbatch: into its pixels or its targets."""
    batch = micro[1]
    if place == "pixels":
        patches = batch.images.patches.float() / 255
        patches[:8] = torch.nan  # some of them are not masked
        batch = replace(batch, images=replace(batch.images, patches=patches))
    else:
        assert batch.targets is not None
        batch.targets.features["dinov3"][2, 5] = torch.nan
    return (micro[0], batch, *micro[2:])


def with_guard(case: Case, mesh: Mesh, guard: GuardConfig) -> tuple[Engine, object]:
    engine, objective = start_engine(case, mesh)
    engine.guard = guard
    return engine, objective


def step_with_nan(rank: int, world: int, case: Case, place: str) -> tuple[str, bool]:
    """What the step raises, and whether weights and moments are as before."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    micro = named(micro_of(case, mesh), mesh)
    engine.step(objective, micro, 0)
    before = whole_state(engine, mesh)
    with pytest.raises(NonFiniteStep) as raised:
        engine.step(objective, poisoned(micro, place) if mesh.dp_rank == 1 else micro, 1)
    after = whole_state(engine, mesh)
    return str(raised.value), all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("case", "place", "where"),
    [
        (Case(world=4, tp=2, optimizer="muon"), "targets", "gradients"),
        (Case(world=4, pp=2), "pixels", "features"),
        (Case(world=2, stage="contrast", optimizer="adamw", zero=2), "pixels", "features"),
    ],
)
def test_one_nan_is_told_everywhere_and_changes_nothing(pool: Pool, case: Case, place: str, where: str) -> None:
    answers = pool.run(step_with_nan, world=case.world, args=(case, place))
    assert all(same for _, same in answers)
    assert len({message for message, _ in answers}) == 1
    message = answers[0][0]
    assert "step 1" in message and f"microbatch 1: {where} (samples 110, 111)" in message
    assert "microbatch 0" not in message and "\n" not in message


def skip_and_go_on(rank: int, world: int, case: Case) -> tuple[bool, StepReport]:
    """Whether a run that skips its second step continues as one that never had it."""
    mesh = start_mesh(run_config(case).parallel)
    states = []
    for bad in (True, False):
        engine, objective = with_guard(case, mesh, GuardConfig(non_finite="skip", max_skips=1))
        micro = micro_of(case, mesh)
        engine.step(objective, micro, 0)
        if bad:
            skipped = engine.step(objective, poisoned(micro_of(case, mesh), "targets") if rank == 0 else micro, 1)
        engine.step(objective, micro, 2)
        states.append(whole_state(engine, mesh))
    return all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items()), skipped


def skip_twice(rank: int, world: int, case: Case) -> str:
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = with_guard(case, mesh, GuardConfig(non_finite="skip", max_skips=1))
    engine.step(objective, poisoned(micro_of(case, mesh), "targets"), 0)
    with pytest.raises(NonFiniteStep) as raised:
        engine.step(objective, poisoned(micro_of(case, mesh), "targets"), 1)
    return str(raised.value)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_skipped_step_leaves_no_trace(pool: Pool, zero: int) -> None:
    for same, report in pool.run(skip_and_go_on, world=2, args=(Case(optimizer="muon", zero=zero),)):
        assert same
        assert "nothing was updated" in report.skipped and "rank 0, microbatch 1" in report.skipped


def test_skips_in_a_row_are_bounded(pool: Pool) -> None:
    assert "max_skips=1" in pool.run(skip_twice, world=1, args=(Case(),))[0]
