"""The trainer fed by the batch server does what the trainer that loads for itself does, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvit.train import main
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_shards
from tests.pool import Pool
from tools.compare_runs import Arguments, compare_runs

STEPS = 3


def train_on_rank(rank: int, world: int, argv: list[str]) -> int:
    return main(argv)


@pytest.mark.timeout(600)
def test_a_served_run_is_the_run_that_loads_for_itself(pool: Pool, tmp_path: Path) -> None:
    """Stage 2 on two data-parallel ranks, held-out batches included."""
    write_shards(tmp_path / "shards", "numbers-00000", 48)
    write_shards(tmp_path / "heldout", "numbers-00000", 16)
    argv = ["demo_stage2", "--data.shards", str(tmp_path / "shards"), "--data.eval-shards", str(tmp_path / "heldout")]
    argv += ["--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "8"]
    argv += ["--data.text-tokens-per-pack", "256", "--eval.every-steps", "2", "--eval.steps", "1"]
    argv += ["--schedule.steps", str(STEPS), "--log.wandb", "off"]
    for loading in ("in_process", "server"):
        run = [*argv, "--data.loading", loading, "--out", str(tmp_path / loading)]
        assert pool.run(train_on_rank, 2, (run,), timeout_s=280.0) == [0, 0]
    lines = read_metrics(tmp_path / "server" / "metrics.jsonl")
    assert [line["images"] for line in lines] == [16] * STEPS and "eval_loss" in lines[1]
    assert compare_runs(Arguments(str(tmp_path / "in_process"), str(tmp_path / "server"))) == 0
