"""The trainer fed by the batch server does what the trainer that loads for itself does, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvit.train import main
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.pool import Pool
from tools.compare_runs import Arguments, compare_runs

STEPS = 3
SMALL = (
    "--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "8",
    "--eval.every-steps", "2", "--eval.steps", "1", "--schedule.steps", str(STEPS), "--log.wandb", "off",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def train_on_rank(rank: int, world: int, argv: list[str]) -> int:
    return main(argv)


@pytest.mark.long
@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("demo_stage1", ("--parallel.tp", "2")),
        ("demo_stage2", ("--data.text-tokens-per-pack", "256")),
    ],
    ids=["stage1-tp2", "stage2-dp2"],
)
def test_a_served_run_is_the_run_that_loads_for_itself(
    pool: Pool, world: Path, preset: str, flags: tuple[str, ...]
) -> None:
    """Held-out batches included; the teachers of stage 1 share the server's Ray."""
    argv = [
        preset,
        *flags,
        *SMALL,
        "--data.shards",
        str(world / "shards"),
        "--data.eval-shards",
        str(world / "heldout"),
    ]
    if preset == "demo_stage1":
        for name in ("siglip2", "dinov3"):
            argv += [f"--teachers.members.{name}.path", str(world / "teachers" / name)]
    runs = {loading: world / preset / loading for loading in ("in_process", "server")}
    for loading, out in runs.items():
        run = [*argv, "--data.loading", loading, "--out", str(out)]
        assert pool.run(train_on_rank, 2, (run,), timeout_s=330.0) == [0, 0]
    lines = read_metrics(runs["server"] / "metrics.jsonl")
    assert [line["images"] for line in lines] == [16] * STEPS and "eval_loss" in lines[1]
    assert compare_runs(Arguments(*map(str, runs.values()))) == 0
