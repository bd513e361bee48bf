"""The experiment on what a policy learns: what its command refuses, and its way from right answers to figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cogvit.errors import ConfigError
from tools.experiments.policy import Arguments, courses, measure
from tools.experiments.policy_course import Exam, Learned, Worth
from tools.experiments.policy_record import curve, falls_by, learned_table, picture, stability_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments("tell", ("digits",)), "'tell' must be worth, start or learn"),
        (Arguments("worth", ("runs/none",)), "--tasks NAME,... is needed"),
        (Arguments("worth", ("runs/none",), tasks="nose"), "nose"),
        (Arguments("learn", ("digits,nose",)), "'nose' is no task to begin with; tasks are digits, counting"),
        (Arguments("learn", ("digits",), steps="0"), "--steps 0 must be a positive whole number"),
        (
            Arguments("learn", ("digits",), start_steps="9,9"),
            "--start-steps 9,9 must be one positive number or one",
        ),
        (Arguments("start", ("digits",), start_steps="0"), "--start-steps 0 must be one positive number or one"),
        (Arguments("learn", ("digits",), lr="nan"), "--lr nan must be a positive number"),
        (Arguments("learn", ("digits",), seeds="0,one"), "--seeds 0,one must be whole numbers with commas between"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(arguments)


def learned(seed: int, staleness: int, rewards: list[float]) -> Learned:
    """A policy of one task whose steps had these rewards, the second one a ratio of 0.8."""
    same = {"staleness": float(staleness), "clipped": 0.1, "stale_prompts": 1.0, "failed_prompts": 0.0}
    own = [{"reward_digits": reward, "ratio": 0.8 if place == 1 else 1.0, "logprob_gap": place * 1e-6} | same
           for place, reward in enumerate(rewards)]  # fmt: skip
    before, after = Worth(0.5, 0.9, 0.1, 0), Worth(0.5 + 0.1 * (seed + 1), 1.0, 0.1, 0)
    return Learned("digits", seed, staleness, "digits", before, after, own)


def test_each_task_has_its_start() -> None:
    asked = Arguments("learn", ("digits,reading", "counting"), start_steps="100,40")
    found = courses(asked, Exam(1, 2, 7))
    assert [(tasks, course.start_steps) for tasks, course in found] == [("digits,reading", 100), ("counting", 40)]
    assert {course.max_new_tokens for _, course in found} == {7}


def test_tables_say_what_was_learned_and_how_steadily() -> None:
    rows = [learned(0, 2, [0.5, 0.7, 0.3]), learned(1, 2, [0.5, 0.6, 0.9])]
    *_, mean = learned_table(rows)
    assert mean.endswith("| 0.650 ± 0.071 | 1.000 ± 0.000 | 0.100 ± 0.000 | 0.150 ± 0.071 |")
    _, _, first, _ = stability_table(rows)
    assert first == "| digits | 0 | 2 | digits | 2.00 | 0.500 | 0.100 | 0.1000 | 0.933, 0.800 | 2.0e-06 | 3 | 0 |"


def test_a_curve_falls_from_where_it_was() -> None:
    assert falls_by([0.2, 0.6, 0.4, 0.5, 0.1, 0.7]) == pytest.approx(0.5) and falls_by([0.1, 0.2]) == 0.0
    assert curve(learned(0, 0, [0.0, 1.0, 0.5]), 2) == pytest.approx([0.0, 0.5, 0.75])


def test_a_picture_has_a_line_a_task_or_a_staleness() -> None:
    rows = [learned(seed, age, [0.1, 0.2]) for seed in (0, 1) for age in (0, 4)]
    assert "staleness 4" in picture(rows) and ">digits<" in picture(rows[::2])


@pytest.mark.long
def test_a_policy_is_trained_once_and_asked(tmp_path: Path) -> None:
    words = ["learn", "digits", "--work", str(tmp_path), "--samples", "200", "--start-steps", "2", "--steps", "2"]
    command = [sys.executable, "-m", "tools.experiments.policy", *words, "--prompts", "4", "--group", "2"]
    first, again = (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300) for _ in range(2)
    )
    row, *_ = [line for line in again.stdout.splitlines() if line.startswith("| digits | 0 | 0 | digits |")]
    assert row in first.stdout and len(row.split("|")) == 13
    assert all(0.0 <= float(figure) <= 1.0 for figure in row.split("|")[5:11])
