"""A rank that hangs leaves its stacks and ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HANG = """
import sys, time
from pathlib import Path
from cogvit.training.watchdog import Watchdog

def waits_for_a_peer():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), float(sys.argv[2])) as watchdog:
    for _ in range(3):
        watchdog.feed()
    if sys.argv[3] == "rest":
        watchdog.rest()
        time.sleep(1.5)
    if sys.argv[3] == "hang":
        waits_for_a_peer()
print("left in peace")
"""


def run(stacks: Path, timeout_s: float, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANG, str(stacks), str(timeout_s), mode], capture_output=True, text=True, timeout=50
    )


def test_a_hang_ends_with_its_stacks(tmp_path: Path) -> None:
    start_s = time.monotonic()
    ended = run(tmp_path / "stacks.txt", 0.5, "hang")
    assert ended.returncode == 1 and time.monotonic() - start_s < 45
    assert (tmp_path / "stacks.txt").read_text().count("waits_for_a_peer") == 1
    run(tmp_path / "stacks.txt", 0.5, "hang")
    assert (tmp_path / "stacks.txt").read_text().count("waits_for_a_peer") == 2  # the first ones are still there


def test_a_run_that_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    for timeout_s, mode in ((30.0, "end"), (0.5, "rest"), (0.0, "end")):
        ended = run(tmp_path / "stacks.txt", timeout_s, mode)
        assert ended.returncode == 0, mode
    assert ended.returncode == 0 and ended.stdout == "left in peace\n"
    assert (tmp_path / "stacks.txt").read_text() == ""
