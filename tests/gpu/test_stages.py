"""Both stages as a user starts them, on up to two GPUs in bf16: they end, losses fall, they evaluate and resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.e2e.test_commands import ROOT, SMALL, TEACHERS, run

pytestmark = pytest.mark.timeout(1800)
STEPS = 20
COMMON = ("--data.shards", "shards", "--precision", "bf16", "--schedule.steps", str(STEPS), *SMALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the repository's folders, shards, held-out shards and teachers."""
    directory = write_world(tmp_path_factory.mktemp("world"))
    for name in ("cogvit", "configs", "data_pipeline", "launch", "tools"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def assert_trained(out: Path) -> None:
    lines = read_metrics(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_machine_is_fit(world: Path) -> None:
    printed = run(world, ["python", "-m", "tools.doctor", "--out", "runs", "--disk-gb", "1"])
    assert torch.cuda.get_device_name() in printed


def test_two_stages_in_bf16(world: Path) -> None:
    ranks = min(2, torch.cuda.device_count())
    start = ["launch/local.sh", str(ranks)]
    run(
        world,
        [*start, "demo_stage1", "--parallel.tp", str(ranks), "--out", "runs/stage1", *TEACHERS, *COMMON],
        timeout_s=600.0,
    )
    assert_trained(world / "runs" / "stage1")
    stage2 = [*start, "demo_stage2", "--init", "runs/stage1", "--out", "runs/stage2", *COMMON]
    run(world, stage2, timeout_s=600.0)
    assert_trained(world / "runs" / "stage2")
    run(world, stage2)  # a finished run resumes at its end and leaves
    assert_trained(world / "runs" / "stage2")
    run(world, ["python", "-m", "cogvit.evaluate", "runs/stage2", "--data", "heldout", "--out", "eval.json"])
