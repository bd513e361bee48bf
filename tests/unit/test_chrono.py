"""The wall time of a run over its starts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cogvit.training.chrono import Chrono, after_restart
from tests.disk import files_of_at_most


def write_steps(out: Path, steps: range, seconds: float, ended_s_ago: float) -> None:
    out.mkdir(exist_ok=True)
    path = out / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "seconds": seconds}) + "\n" for step in steps))
    os.utime(path, (time.time() - ended_s_ago,) * 2)


def test_first_start_costs_its_launch(tmp_path: Path) -> None:
    assert after_restart(Chrono(), tmp_path, 0, 7.0) == Chrono(restart_s=7.0)


def test_steps_after_the_checkpoint_are_lost_and_the_pause_counts(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 7), 2.0, ended_s_ago=50.0)
    chrono = after_restart(Chrono(step_s=8.0, restart_s=7.0), tmp_path, 4, 20.0)
    assert (chrono.step_s, chrono.lost_s) == (8.0, 4.0)
    assert chrono.restart_s == pytest.approx(57.0, abs=2.0)
    assert chrono.goodput == pytest.approx(8.0 / 69.0, abs=0.01)


def test_two_faults_before_a_save_both_count(tmp_path: Path) -> None:
    saved = Chrono(step_s=8.0)
    for _ in range(2):
        write_steps(tmp_path, range(1, 7), 2.0, ended_s_ago=50.0)
        chrono = after_restart(saved, tmp_path, 4, 20.0)
    assert chrono.lost_s == 8.0
    assert chrono.restart_s == pytest.approx(100.0, abs=4.0)
    # What a checkpoint holds by now is not counted again.
    write_steps(tmp_path, range(1, 5), 2.0, ended_s_ago=10.0)
    assert after_restart(chrono, tmp_path, 4, 1.0).lost_s == 8.0


def test_a_clock_that_went_back_takes_no_time_away(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3), 2.0, ended_s_ago=-1000.0)
    assert after_restart(Chrono(), tmp_path, 2, 20.0).restart_s == 20.0


@pytest.mark.parametrize("content", ["", '{"lost_s": 3.', "[]", "{}", '{"lost_s": null, "restart_s": 1.0}'])
def test_a_file_that_a_kill_or_a_full_disk_left_half_costs_its_times_and_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "chrono.json").write_text(content)
    assert after_restart(Chrono(), tmp_path, 0, 7.0) == Chrono(restart_s=7.0)
    assert "chrono.json cannot be read" in caplog.text
    assert json.loads((tmp_path / "logs" / "chrono.json").read_text()) == {"lost_s": 0.0, "restart_s": 7.0}


def test_a_full_disk_leaves_the_times_before_and_stops_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    after_restart(Chrono(), tmp_path, 0, 7.0)
    with files_of_at_most(4):
        assert after_restart(Chrono(), tmp_path, 0, 5.0) == Chrono(restart_s=12.0)
    assert "chrono.json could not be written (File too large)" in caplog.text
    assert after_restart(Chrono(), tmp_path, 0, 1.0) == Chrono(restart_s=8.0)
