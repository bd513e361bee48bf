"""Where checkpoints go and when: --checkpoint.dir, which no other run may take for its own, and saves by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_own_shards import refusal, train, write_img2dataset
from tests.pool import Pool
from tools.checkpoint import Arguments, inspect


def test_the_checkpoints_of_another_run_are_refused(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"])
    flags = [
        "--data.global-batch-images",
        "6",
        "--data.lookahead-steps",
        "1",
        "--checkpoint.dir",
        str(tmp_path / "there"),
    ]
    train(pool, 2, shards, tmp_path / "first", *flags)
    assert inspect(Arguments("list", str(tmp_path / "first"))) == 0
    assert capsys.readouterr().out.startswith("step_00000002") and not (tmp_path / "first" / "checkpoints").exists()
    assert len(train(pool, 1, shards, tmp_path / "first", *flags)) == 2  # nothing is left to do

    argv = ["demo_stage2", "--data.shards", str(shards), "--out", str(tmp_path / "second"), "--schedule.steps", "2"]
    argv += ["--eval.every-steps", "0", "--log.wandb", "off", "--data.tokens-per-pack", "256", *flags]
    argv += ["--data.images-per-pack", "8", "--data.text-tokens-per-pack", "256", "--optim.lr", "0.5"]
    (status, printed), _ = pool.run(refusal, 2, (argv,), timeout_s=100.0)
    assert status == 2
    assert (
        f"error: {tmp_path}/there holds another run (optim.lr: 0.01 -> 0.5); choose another --checkpoint.dir" in printed
    )


def test_saves_go_by_the_clock_too(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"])
    flags = ["--data.global-batch-images", "6", "--data.lookahead-steps", "1", "--checkpoint.every-steps", "0"]
    for name, minutes in (("often", "0.0001"), ("seldom", "60")):
        train(pool, 2, shards, tmp_path / name, *flags, "--checkpoint.every-minutes", minutes)
        assert inspect(Arguments("list", str(tmp_path / name))) == 0
        saved = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert saved == (["step_00000001"] if name == "often" else []) + ["step_00000002"]
