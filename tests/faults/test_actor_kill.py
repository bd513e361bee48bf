"""kill -9 of a teacher's actor in the middle of training: the run goes on and its weights are those of a quiet one."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from cogvit.train import main
from cogvit.training.checkpoint import folder_of, weights
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.pool import Pool

STEPS = 16
FLAGS = (
    "demo_stage1", "--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "12",
    "--eval.every-steps", "0", "--log.wandb", "off", "--schedule.steps", str(STEPS),
    "--teachers.members.dinov3.summary-weight", "0.5",
)  # fmt: skip


def actors_of(token: str) -> list[int]:
    """The processes of actors on the Ray cluster with this token."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            name = (directory / "cmdline").read_bytes()
            if name.startswith(b"ray::TeacherActor") and token.encode() in (directory / "environ").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def train(rank: int, world: int, argv: list[str], kill_after_step: int) -> tuple[int, int, list[str]]:
    """Train, with every actor killed after a step; returns status, number of dead and what was said of them."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cogvit.teacher.actors").addHandler(handler)
    killed: list[int] = []

    def kill() -> None:
        metrics = Path(argv[-1]) / "metrics.jsonl"
        while not metrics.exists() or len(read_metrics(metrics)) < kill_after_step:
            time.sleep(0.01)
        killed.extend(actors_of(os.environ["RAY_AUTH_TOKEN"]))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    if kill_after_step:
        threading.Thread(target=kill, daemon=True).start()
    return main(argv), len(killed), said


@pytest.mark.timeout(900)
def test_a_run_whose_actors_are_killed_ends_with_the_same_bits(pool: Pool, tmp_path: Path) -> None:
    world = write_world(tmp_path)
    paths = [f"--teachers.members.{name}.path={world / 'teachers' / name}" for name in ("siglip2", "dinov3")]
    argv = [*FLAGS, *paths, "--data.shards", str(world / "shards"), "--out"]
    ends = {}
    for name, kill_after_step in (("quiet", 0), ("struck", 3)):
        run = [*argv, str(tmp_path / name)]
        ((status, num_killed, said),) = pool.run(train, 1, (run, kill_after_step), timeout_s=400.0)
        assert status == 0 and num_killed == (2 if kill_after_step else 0)
        assert any("s late; nothing is skipped" in line for line in said) == bool(kill_after_step), said
        curve = [
            (row["step"], row["loss"], row["loss_dinov3_summary"])
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        assert [step for step, *_ in curve] == list(range(1, STEPS + 1))
        ends[name] = curve, weights(folder_of(tmp_path / name) / f"step_{STEPS:08d}", "")
    (curve, mine), (other_curve, theirs) = ends.values()
    assert curve == other_curve and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
