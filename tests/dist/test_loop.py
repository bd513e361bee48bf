"""The training loop's order: what a step leaves behind when something fails after it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from cogvit.batch import DataPosition, StepBatch
from cogvit.config import CheckpointConfig
from cogvit.errors import TeacherUnavailable
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.training.checkpoint import Checkpoints, latest, read_state
from cogvit.training.folder import Folder
from cogvit.training.loop import Evaluation, train
from cogvit.training.meter import Meter, read_metrics
from cogvit.training.signals import StopRequest
from cogvit.training.spikes import SpikeLog
from cogvit.training.state import TrainState
from cogvit.training.watchdog import Watchdog
from tests.dist.runs import Case, micro_of, run_config, start_engine
from tests.pool import Pool

START = TrainState(step=0, position=DataPosition("plan", 0), images=0, tokens=0)


def steps_of(case: Case, mesh: Mesh) -> Iterator[StepBatch]:
    step = 0
    while True:
        step += 1
        yield StepBatch(micro_of(case, mesh), DataPosition("plan", step))


def train_until_teachers_fail(rank: int, world: int, out: Path) -> str:
    """Evaluate after step 2 with teachers that answer for one held-out batch and no more; returns how it ended."""
    case = Case(world=world)
    config = run_config(case)
    mesh = start_mesh(config.parallel)
    engine, objective = start_engine(case, mesh)

    def held_out() -> Generator[StepBatch]:
        yield next(steps_of(case, mesh))
        raise TeacherUnavailable("no teacher answers")

    with (
        Checkpoints(Folder(str(out / "checkpoints")), mesh, CheckpointConfig(), out / "newest") as checkpoints,
        Meter(out, config, mesh.is_writer, 0) as meter,
        Watchdog(out / f"stacks_{rank}", 60.0) as watchdog,
        StopRequest() as stop,
    ):
        try:
            train(
                engine,
                objective,
                steps_of(case, mesh),
                START,
                steps=4,
                checkpoints=checkpoints,
                evaluation=Evaluation(2, 2, held_out, last=4, concern=lambda step, values: ""),
                meter=meter,
                stop=stop,
                watchdog=watchdog,
                spikes=SpikeLog(out / "spikes.jsonl", 0.0),
            )
        except TeacherUnavailable as error:
            return str(error)
    return ""


def test_a_step_whose_evaluation_has_no_teachers_is_saved_and_recorded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(train_until_teachers_fail, world=2, args=(tmp_path,)) == ["no teacher answers"] * 2
    checkpoint = latest(Folder(str(tmp_path / "checkpoints")))
    assert checkpoint is not None and read_state(checkpoint).step == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
