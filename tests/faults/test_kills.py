"""kill -9 at random moments of a short run, saving included: it always resumes, and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from cogvit.train import main
from cogvit.training.checkpoint import folder_of, latest, read_state, weights
from cogvit.training.chrono import Chrono
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_shards
from tests.pool import Pool

STEPS = 12
SAVED_EVERY = 3
FLAGS = (
    "demo_stage2", "--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "12",
    "--eval.every-steps", "0", "--log.wandb", "off", "--schedule.steps", str(STEPS),
    "--checkpoint.every-steps", str(SAVED_EVERY),
)  # fmt: skip


def train(rank: int, world: int, argv: list[str], victim: int, delay_s: float) -> tuple[int, float]:
    """Train on a rank, which kills itself after a while if it is the victim; returns status and seconds."""
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    if rank == victim:
        timer.start()
    start_s = time.monotonic()
    try:
        return main(argv), time.monotonic() - start_s
    finally:
        timer.cancel()  # a run that ends sooner is not killed, and neither is the next one


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.long)])
def test_a_killed_run_always_resumes(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    write_shards(tmp_path / "shards", "numbers-00000", 48)
    argv = [*FLAGS, "--data.shards", str(tmp_path / "shards"), "--out"]
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed-0"
    (status, whole_s), (other_status, _) = pool.run(train, 2, ([*argv, str(straight)], -1, 0.0), timeout_s=120)
    assert (status, other_status) == (0, 0)
    draw = random.Random(kills)
    killed, ends, of_this_run = 0, 0, 0
    while killed < kills or latest(folder_of(disturbed)) is None or last_step(disturbed) < STEPS:
        victim = draw.randrange(2) if killed < kills else -1
        try:
            how = ([*argv, str(disturbed)], victim, draw.uniform(0.0, whole_s))
            ended = pool.run(train, 2, how, timeout_s=120)
        except ChildProcessError as error:
            assert "-9" in str(error)
            killed, of_this_run = killed + 1, of_this_run + 1
            continue
        assert [status for status, _ in ended] == [0, 0]
        assert_same(disturbed, straight)
        ends += 1
        if killed < kills:
            disturbed, of_this_run = tmp_path / f"disturbed-{ends}", 0
    assert_same(disturbed, straight)
    path = latest(folder_of(disturbed))
    assert path is not None
    with capsys.disabled():  # these are figures to read, also where all is well
        print(f"\n{killed} kills, {ends} runs to the end; of the last, {goodput(read_state(path).chrono, of_this_run)}")


def goodput(chrono: Chrono, kills: int) -> str:
    """Say what the kills cost, and what would be left with an hour between them."""
    cost_s = (chrono.lost_s + chrono.restart_s) / max(1, kills)
    return f"{kills} kills: {chrono}, goodput {chrono.goodput:.1%}, {3600 / (3600 + cost_s):.1%} at one kill an hour"


def last_step(run: Path) -> int:
    path = latest(folder_of(run))
    return 0 if path is None else read_state(path).step


def assert_same(run: Path, other: Path) -> None:
    """The last weights and every step's loss are equal to the bit."""
    mine, theirs = (weights(folder_of(path) / f"step_{STEPS:08d}", "") for path in (run, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys()
    curves = [[(row["step"], row["loss"]) for row in read_metrics(path / "metrics.jsonl")] for path in (run, other)]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
