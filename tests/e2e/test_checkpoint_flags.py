"""Where checkpoints go and when: --checkpoint.dir, which no other run may take for its own, and saves by the clock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cogvit.training.lock import run_lock
from tests.e2e.test_own_shards import flags_of, refusal, train, write_img2dataset
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

    refused = refuse(pool, 2, [*flags_of(shards, tmp_path / "second"), *flags, "--optim.lr", "0.5"])
    told = f"error: {tmp_path}/there holds another run (optim.lr: 0.01 -> 0.5); choose another --checkpoint.dir"
    assert told in refused


@pytest.mark.long
def test_the_same_recipe_in_another_out_is_another_run_until_somebody_says_otherwise(
    pool: Pool, tmp_path: Path
) -> None:
    shards, there = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"]), tmp_path / "there"
    flags = ["--data.global-batch-images", "6", "--data.lookahead-steps", "1", "--checkpoint.dir", str(there)]
    train(pool, 1, shards, tmp_path / "first", *flags)
    (tmp_path / "first").rename(tmp_path / "renamed")
    refused = refuse(pool, 1, [*flags_of(shards, tmp_path / "renamed"), *flags])
    assert f"{there} holds the checkpoints of --out {tmp_path}/first, and this is --out {tmp_path}/renamed; " in refused
    assert f"remove {there}/config.json if it is the same run, moved or renamed" in refused
    (tmp_path / "first").symlink_to(tmp_path / "renamed")
    assert len(train(pool, 1, shards, tmp_path / "renamed", *flags)) == 2  # the same folder by another name
    (tmp_path / "first").unlink()
    (there / "config.json").unlink()
    assert len(train(pool, 1, shards, tmp_path / "renamed", *flags)) == 2  # nothing was left to do


def test_checkpoints_that_a_run_is_writing_are_locked(pool: Pool, tmp_path: Path) -> None:
    shards, there = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"]), tmp_path / "there"
    there.mkdir()
    flags = ["--data.global-batch-images", "6", "--data.lookahead-steps", "1", "--checkpoint.dir", str(there)]
    with run_lock(there):
        refused = refuse(pool, 1, [*flags_of(shards, tmp_path / "run"), *flags])
    assert f"--checkpoint.dir {there} is in use by process {os.getpid()} on " in refused


def refuse(pool: Pool, world: int, argv: list[str]) -> str:
    """Return what a start that is refused says."""
    answers = pool.run(refusal, world, (argv,), timeout_s=100.0)
    assert [status for status, _ in answers] == [2] * world
    return answers[0][1]


@pytest.mark.long
def test_saves_go_by_the_clock_too(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"])
    flags = ["--data.global-batch-images", "6", "--data.lookahead-steps", "1", "--checkpoint.every-steps", "0"]
    for name, minutes in (("often", "0.0001"), ("seldom", "60")):
        train(pool, 2, shards, tmp_path / name, *flags, "--checkpoint.every-minutes", minutes)
        assert inspect(Arguments("list", str(tmp_path / name))) == 0
        saved = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert saved == (["step_00000001"] if name == "often" else []) + ["step_00000002"]
