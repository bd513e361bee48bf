"""The experiment on what a policy learns: what its command refuses, and its way from right answers to figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cogvit.errors import ConfigError
from tools.experiments.policy import Arguments, measure

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments("tell", ("digits",)), "'tell' must be worth or learn"),
        (Arguments("worth", ("runs/none",)), "--tasks NAME,... is needed"),
        (Arguments("worth", ("runs/none",), tasks="nose"), "nose"),
        (Arguments("learn", ("digits,nose",)), "'nose' is no task to begin with; tasks are digits, counting"),
        (Arguments("learn", ("digits",), steps="0"), "--steps 0 must be a positive whole number"),
        (Arguments("learn", ("digits",), seeds="0,one"), "--seeds 0,one must be whole numbers with commas between"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(arguments)


@pytest.mark.long
def test_a_policy_is_trained_once_and_asked(tmp_path: Path) -> None:
    words = ["learn", "digits", "--work", str(tmp_path), "--samples", "200", "--start-steps", "2", "--steps", "2"]
    command = [sys.executable, "-m", "tools.experiments.policy", *words, "--prompts", "4", "--group", "2"]
    first, again = (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300) for _ in range(2)
    )
    (row,) = [line for line in again.stdout.splitlines() if line.startswith("| digits | 0 | 0 | digits |")]
    assert row in first.stdout and len(row.split("|")) == 12
    assert all(0.0 <= float(figure) <= 1.0 for figure in row.split("|")[5:11])
