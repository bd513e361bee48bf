"""Sequential order trains for real: un-indexed shards out of a command, on two ranks, and again on one after a stop."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from cogvit.training.meter import read_metrics
from tests.data.corpus import members, picture, write_tar
from tests.e2e.test_own_shards import refusal, train_on_rank
from tests.pool import Pool


def write_streams(directory: Path) -> str:
    """Two shards without an index, of different lengths; returns a command for each."""
    for shard, size in enumerate((9, 14)):
        entries = []
        for number in range(size):
            image = picture(24 + 8 * (number % 3), 24, 50 * shard + number, "JPEG")
            entries += members(f"{number:02d}", image, "jpg", caption=f"picture {number} of {shard}")
        write_tar(directory / f"{shard}.tar", entries)
    return f"pipe:cat {directory}/{{0..1}}.tar"


def command(shards: str, out: Path, *flags: str) -> list[str]:
    argv = ["demo_stage2", "--data.shards", shards, "--data.order", "sequential", "--out", str(out)]
    argv += ["--schedule.steps", "4", "--checkpoint.every-steps", "2", "--eval.every-steps", "0", "--log.wandb", "off"]
    argv += ["--data.global-batch-images", "8", "--data.tokens-per-pack", "256", "--data.images-per-pack", "8"]
    return [*argv, "--data.text-tokens-per-pack", "256", "--data.lookahead-steps", "2", "--data.crop", "0.5", *flags]


def test_streams_train_on_two_ranks_and_resume_on_one(pool: Pool, tmp_path: Path) -> None:
    shards, out = write_streams(tmp_path / "shards"), tmp_path / "run"
    for name, world in (("run", 2), ("again", 2)):
        argv = command(shards, tmp_path / name)
        assert pool.run(train_on_rank, world, (argv,), timeout_s=100.0) == [0] * world
    lines, again = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "again"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    shutil.rmtree(out / "checkpoints" / "step_00000004")
    assert pool.run(train_on_rank, 1, (command(shards, out),), timeout_s=100.0) == [0]
    resumed = read_metrics(out / "metrics.jsonl")
    for step, line in enumerate(resumed, start=1):
        assert line["step"] == step and line["images"] == 8.0
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0.0
    assert [line["loss"] for line in resumed[:2]] == [line["loss"] for line in lines[:2]]
    assert not list((tmp_path / "shards").glob("*.parquet"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.where", "width_px > 9"], "has no index for data.where"),
        (["--data.mixture", '[["default", 1.0]]'], "has no index for data.mixture"),
        (["--data.loading", "server"], "has no index for data.loading"),
        (["--data.order", "planned"], "pass --data.cache-dir DIR"),
    ],
)
def test_what_needs_an_index_is_refused(pool: Pool, tmp_path: Path, flags: list[str], message: str) -> None:
    argv = command(write_streams(tmp_path / "shards"), tmp_path / "run", *flags)
    ((status, printed),) = pool.run(refusal, 1, (argv,))
    assert status == 2 and message in printed and printed.count("\n") == 1
