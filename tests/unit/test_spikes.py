"""The log of loss spikes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogvit.training.spikes import SpikeLog
from tests.disk import files_of_at_most


def test_a_loss_that_stands_out_is_logged_once(tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / "spikes.jsonl", factor=2.0)
    for step in range(20):
        assert log.record(step, {"loss": 1.0 + 0.01 * step, "grad_norm": 0.5}) is None
    line = log.record(20, {"loss": 3.0, "grad_norm": 9.0, "seconds": 1.0})
    assert line is not None and "step 20" in line and "2.7 times" in line
    assert log.record(21, {"loss": 1.2, "grad_norm": 0.5}) is None
    rows = [json.loads(row) for row in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert rows == [{"step": 20, "loss": 3.0, "median": pytest.approx(1.095), "grad_norm": 9.0}]


def test_the_first_steps_and_a_factor_of_zero_are_silent(tmp_path: Path) -> None:
    log, off = SpikeLog(tmp_path / "a", factor=2.0), SpikeLog(tmp_path / "b", factor=0.0)
    assert all(log.record(step, {"loss": 100.0 / (1 + step)}) is None for step in range(8))
    assert [off.record(step, {"loss": 10.0**step}) for step in range(20)] == [None] * 20
    assert not (tmp_path / "b").exists()


def test_a_full_disk_puts_the_line_where_it_can_be_read(tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / "spikes.jsonl", factor=2.0)
    assert all(log.record(step, {"loss": 1.0}) is None for step in range(20))
    with files_of_at_most(4):
        line = log.record(20, {"loss": 3.0, "grad_norm": 9.0})
    assert line is not None and 'cannot be written (File too large): {"step": 20' in line and '"grad_norm": 9.0' in line


def test_noise_of_a_loss_near_zero_is_no_spike(tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / "spikes.jsonl", factor=2.0)
    for step in range(100):
        assert log.record(step, {"loss": 0.005 if step % 5 == 0 else 1e-5}) is None
    assert log.record(100, {"loss": 0.5}) is not None
