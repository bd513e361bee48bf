"""Stage 4 trains in every layout on what it answered itself, resumes to the bit, and never blind."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import cogvit.model.vlm
import cogvit.parallel.language
import cogvit.report.__main__ as report
from cogvit.config import ParallelConfig, RunConfig
from cogvit.rl import ledger
from cogvit.rl.rounds import LEDGER
from cogvit.rl.speaker import PlainSpeaker
from cogvit.training.joint import load_joint
from cogvit.training.meter import read_metrics
from tests.conversations import preset
from tests.e2e.test_own_shards import refusal, train_on_rank
from tests.e2e.test_stage3 import digests, losses, train_until_killed
from tests.policies import stage4
from tests.pool import Pool

LARGEST_GAP = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return stage4(tmp_path_factory.mktemp("stage4"), min_image_effect=1e-9)


@pytest.fixture(scope="module")
def straight(base: RunConfig, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one process."""
    return run(pool, 1, base, tmp_path_factory.mktemp("straight") / "run")


def run(pool: Pool, world: int, config: RunConfig, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    argv = [preset(out.parent, config), "--out", str(out)]
    assert pool.run(train_on_rank, world, (argv,), timeout_s=150.0) == [0] * world
    return out


def test_a_run_says_what_its_answers_are_worth_and_loses_none(base: RunConfig, straight: Path) -> None:
    lines = read_metrics(straight / "metrics.jsonl")
    for line in lines:
        assert 0.0 <= line["reward_one"] <= line["pass_one"] + 1.0 and "reward_two" in line and line["staleness"] == 0.0
        assert line["logprob_gap"] <= LARGEST_GAP and line["failed_images"] == 0.0
        assert line["images"] <= 4 * 4  # an image of a prompt lies once in a pack, however many answer
        assert line["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert any(line["image_effect_one"] != 0.0 for line in lines) and lines[-1]["grad_norm"] > 0.0
    entries = ledger.read(straight / LEDGER)
    issued = [f"{source}-{number}" for number, source in enumerate(["one", "two"] * 8)]
    assert not ledger.faults(entries, issued) and {entry.end for entry in entries} == {"trained"}
    assert [entry.version for entry in entries] == [step for step in range(4) for _ in range(4)]
    assert load_joint(straight).language.cfg.vocab_size == 288


def test_a_report_shows_what_a_policy_says_and_what_that_is_worth(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.report(report.Arguments((str(straight),), str(tmp_path / "report.html"))) == 0
    page = (tmp_path / "report.html").read_text()
    shown = page.partition("<h2>What is said in new episodes")[2].partition("</section>")[0]
    assert shown.count('<div class="example">') == 2 * 3 and shown.count("data:image/png") == 2 * 3
    assert len(re.findall(r"\([01]\.\d\d\)</span>", shown)) == 2 * 3 * 4 and shown.count("What is two?") == 3 + 3
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, ParallelConfig(tp=2, sequence=True), id="sp2", marks=pytest.mark.long),
        pytest.param(2, ParallelConfig(pp=2), id="pp2"),
        pytest.param(2, ParallelConfig(), id="dp2", marks=pytest.mark.long),
    ],
)
def test_rollout_and_training_agree_in_every_layout(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path, world: int, parallel: ParallelConfig
) -> None:
    out = run(pool, world, replace(base, parallel=parallel), tmp_path / "run")
    assert max(losses(out, "logprob_gap")) <= LARGEST_GAP
    for name in ("loss", "grad_norm", "reward"):  # of the first step; rounding may choose other words later
        assert losses(out, name)[0] == pytest.approx(losses(straight, name)[0], rel=1e-4, abs=1e-6)


def test_a_killed_rank_ends_with_the_same_bits(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    argv = [preset(tmp_path, base), "--out", str(out := tmp_path / "run")]
    with pytest.raises(ChildProcessError, match="-9"):
        pool.run(train_until_killed, 1, (argv, str(out / "metrics.jsonl"), 3), timeout_s=150.0)
    folder = base.rl.tasks.partition("/one.py")[0]
    respelt = base.rl.tasks.replace(folder, f"{folder}/language/..")
    argv[0] = preset(tmp_path, replace(base, rl=replace(base.rl, tasks=respelt)))
    assert pool.run(train_on_rank, 1, (argv,), timeout_s=150.0) == [0]
    assert losses(out) == losses(straight) and losses(out, "reward") == losses(straight, "reward")
    assert digests(out) == digests(straight)
    assert (out / LEDGER).read_text() == (straight / LEDGER).read_text()
    (out / LEDGER).write_text("")
    (out / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    status, told = pool.run(refusal, 1, (argv,), timeout_s=150.0)[0]
    assert status == 2 and "does not reach to step 2" in told


def asked_to_leave(rank: int, world: int, argv: list[str], last: int) -> tuple[int, str]:
    """Train, and be sent SIGTERM while an answer is given, which must be the last one; the process ends with it.

    Returns the exit status and the last line that was printed.
    """
    speak, number = PlainSpeaker.speak, count(1)

    def spoken(*args: object) -> list:
        now = next(number)
        assert now <= last, "somebody has asked the run to leave"
        if now == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return speak(*args)

    PlainSpeaker.speak = spoken
    with redirect_stdout(io.StringIO()) as printed:
        status = train_on_rank(rank, world, argv)
    return status, printed.getvalue().strip().rpartition("\n")[2]


def test_a_run_that_leaves_before_its_first_step_takes_no_directory(
    base: RunConfig, pool: Pool, tmp_path: Path
) -> None:
    argv = [preset(tmp_path, base), "--out", str(out := tmp_path / "run")]
    told = "asked to stop: no step was done; the same command goes on"
    assert pool.run(asked_to_leave, 1, (argv, 1), timeout_s=150.0) == [(75, told)]
    assert not [*(out / "checkpoints").glob("*")] and not (out / "logs" / "newest_checkpoint").exists()
    assert not read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_asked_to_leave_does_not_wait_for_a_steps_answers(
    base: RunConfig, straight: Path, pool: Pool, tmp_path: Path, world: int
) -> None:
    argv = [preset(tmp_path, base), "--out", str(out := tmp_path / "run")]
    first_of_step_2 = 2 * 1 + 2 * 2 + 1  # a step asks twice for one answer and twice for two
    said = ["asked to stop: step 1 of 4 is saved; the same command goes on", *[""] * (world - 1)]
    assert pool.run(asked_to_leave, world, (argv, first_of_step_2), timeout_s=150.0) == [(75, one) for one in said]
    assert len(read_metrics(out / "metrics.jsonl")) == 1 and {one.step for one in ledger.read(out / LEDGER)} == {1}
    assert pool.run(train_on_rank, world, (argv,), timeout_s=150.0) == [0] * world
    if world == 1:
        assert digests(out) == digests(straight)
        assert (out / LEDGER).read_text() == (straight / LEDGER).read_text()


def unseen(x_SD: Tensor, visual_ED: Tensor | None, visual_row_S: Tensor) -> Tensor:
    """Tokens without what stands for images."""
    return x_SD if visual_ED is None else x_SD + 0.0 * visual_ED.sum()


def lied(speak: Callable[..., list]) -> Callable[..., list]:
    """Says log-probabilities that are a hundredth off."""

    def spoken(*args: object) -> list:
        return [replace(said, logprobs=said.logprobs + np.float32(0.01)) for said in speak(*args)]

    return spoken


def faulty(rank: int, world: int, argv: list[str], where: str) -> tuple[int, str]:
    """Train with images dropped in one place or both, or with wrong log-probabilities; the process ends with it."""
    if where in ("rollout", "both"):
        cogvit.model.vlm.place_visual = unseen
    if where in ("training", "both"):
        cogvit.parallel.language.place_visual = unseen
    if where == "logprobs":
        PlainSpeaker.speak = lied(PlainSpeaker.speak)
    return refusal(rank, world, argv)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("rollout", "logprob_gap"),
        ("training", "logprob_gap"),
        ("both", "the policy does not look"),
        ("logprobs", "logprob_gap"),
    ],
)
def test_a_policy_that_does_not_look_or_is_not_itself_stops_its_run(
    base: RunConfig, pool: Pool, tmp_path: Path, where: str, reason: str
) -> None:
    argv = [preset(tmp_path, base), "--out", str(out := tmp_path / "run")]
    status, told = pool.run(faulty, 1, (argv, where), timeout_s=150.0)[0]
    assert status == 1 and reason in told
    assert len(read_metrics(out / "metrics.jsonl")) <= 3


def test_an_actor_answers_as_the_first_rank_does(base: RunConfig, straight: Path, pool: Pool, tmp_path: Path) -> None:
    out = run(pool, 1, replace(base, rl=replace(base.rl, actors=1)), tmp_path / "run")
    assert losses(out) == losses(straight) and digests(out) == digests(straight)
    assert (out / LEDGER).read_text() == (straight / LEDGER).read_text()


@pytest.mark.long
def test_answers_of_older_weights_are_trained_once(base: RunConfig, pool: Pool, tmp_path: Path) -> None:
    stale = replace(base.rl, actors=1, max_staleness=2, abort_after_fraction=0.8)
    config = replace(base, rl=stale, schedule=replace(base.schedule, steps=8))
    argv = [preset(tmp_path, config), "--out", str(out := tmp_path / "run")]
    with pytest.raises(ChildProcessError, match="-9"):
        pool.run(train_until_killed, 1, (argv, str(out / "metrics.jsonl"), 5), timeout_s=200.0)
    assert pool.run(train_on_rank, 1, (argv,), timeout_s=200.0) == [0]
    lines, entries = read_metrics(out / "metrics.jsonl"), ledger.read(out / LEDGER)
    assert max(line.get("logprob_gap", 0.0) for line in lines) <= LARGEST_GAP
    assert max(line["staleness"] for line in lines) > 0.0
    trained = [entry.id for entry in entries if entry.end == "trained"]
    assert len(trained) == len(set(trained)) == 8 * 4
    assert all(entry.step - 1 - entry.version <= 2 for entry in entries if entry.end == "trained")
    assert not [fault for fault in ledger.faults(entries, trained) if "ended" in fault]
