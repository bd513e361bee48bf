"""Two runs are compared to the bit, and the first step and tensor where they part are named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cogvit.config import RunConfig
from cogvit.config.arguments import run_command
from tests.runs_on_disk import write_run
from tools import compare_runs

STEPS = (1, 2, 3, 4)


def rows(last: int = STEPS[-1]) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 1 / step, "grad_norm": math.nan, "data_s": 0.1, "seconds": 0.5, "images_per_s": 9.0}
        for step in range(1, last + 1)
    ]


def write(directory: Path, *, seed: int = 7, steps: tuple[int, ...] = (2, 4), last: int = STEPS[-1]) -> Path:
    """A run with checkpoints of a small module after some of its steps."""
    for step in steps:
        torch.manual_seed(step)
        write_run(directory, RunConfig(seed=seed), {"vision": nn.Linear(4, 3), "text": nn.Linear(2, 2)}, step)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(last)))
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal runs, A and B; tests change copies of them."""
    directory = tmp_path_factory.mktemp("runs")
    for name in "ab":
        write(directory / name)
    return directory


def compare(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> tuple[int, str]:
    status = run_command([str(a), str(b)], "usage", compare_runs.Arguments, compare_runs.compare_runs)
    captured = capsys.readouterr()
    return status, captured.err if status == 2 else captured.out


def edit_metrics(run: Path, change: Callable[[list[dict[str, float]]], None]) -> None:
    lines = rows()
    change(lines)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def change_weight(run: Path, step: int, *, by: float, value: str = "bias") -> None:
    """Write the checkpoint of a step again, with one value of a tensor changed."""
    shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    metrics = (run / "metrics.jsonl").read_text()
    torch.manual_seed(step)
    modules = {"vision": nn.Linear(4, 3), "text": nn.Linear(2, 2)}
    with torch.no_grad():
        getattr(modules["vision"], value)[0] += by
    write_run(run, RunConfig(seed=7), modules, step)
    (run / "metrics.jsonl").write_text(metrics)


def test_equal_runs(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = compare(capsys, pair / "a", pair / "b")
    assert status == 0, text
    assert "metrics: 4 of the same step (1 to 4)" in text
    assert "checkpoints: 2 of the same step (2 to 4)" in text
    assert "identical" in text and "part" not in text


@pytest.fixture
def changed(pair: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(pair / "b", tmp_path / "b")
    return pair / "a", tmp_path / "b"


def test_clocks_do_not_count(changed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def slower(lines: list[dict[str, float]]) -> None:
        for row in lines:
            row |= {"seconds": 3.0, "images_per_s": 1.0, "data_s": 2.0, "valid_fraction": 0.5}

    edit_metrics(changed[1], slower)
    assert compare(capsys, *changed)[0] == 0


def test_the_last_bit_of_a_metric_is_seen(changed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    edit_metrics(changed[1], lambda lines: lines[2].update(loss=math.nextafter(1 / 3, 1.0), extra=1.0))
    status, text = compare(capsys, *changed)
    assert status == 1
    assert "step 3  loss: A 0.3333333333333333, B 0.33333333333333337" in text
    assert "step 3  extra: A absent, B 1.0" in text
    assert "they part first at step 3: loss" in text
    assert "identical" not in text


def test_one_bit_of_a_tensor_is_seen(changed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    change_weight(changed[1], 4, by=1e-7)
    status, text = compare(capsys, *changed)
    assert status == 1
    assert "they part first at step 4: master/vision.bias (1 of 3 values, by up to " in text
    assert "vision.weight" not in text


def test_a_zero_of_the_other_sign_is_a_difference() -> None:
    assert compare_runs._difference_of(torch.zeros(2), torch.tensor([0.0, -0.0])) == "1 of 2 values, by up to 0"
    assert compare_runs._difference_of(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == ""


def test_the_earlier_of_metric_and_tensor_is_named(
    changed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change_weight(changed[1], 2, by=1.0, value="weight")
    change_weight(changed[1], 4, by=1.0)
    edit_metrics(changed[1], lambda lines: lines[2].update(loss=5.0))
    status, text = compare(capsys, *changed)
    assert status == 1
    assert "they part first at step 2: master/vision.weight (4 of 12 values" in text
    assert "step 4 " not in text


def test_other_tensors_and_counters_are_named(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "b"
    for step in (2, 4):
        write_run(run, replace(RunConfig(seed=8), proj_dim=9), {"vision": nn.Linear(4, 2)}, step)
    (run / "metrics.jsonl").write_text((pair / "a" / "metrics.jsonl").read_text())
    status, text = compare(capsys, pair / "a", run)
    assert status == 1
    assert "configured differently: proj_dim" in text and "configured differently: seed: 7 -> 8" in text
    assert "step 2  master/text.bias: A (2,), B absent" in text
    assert "step 2  master/vision.weight: A (3, 4), B (2, 4)" in text
    state = run / "checkpoints" / "step_00000002" / "state.json"
    assert json.loads(state.read_text())["images"] == 20


def test_a_run_that_ended_earlier(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = write(tmp_path / "short", steps=(2,), last=3)
    for runs, name in (((pair / "a", short), "B"), ((short, pair / "a"), "A")):
        status, text = compare(capsys, *runs)
        assert status == 1
        assert f"equal as far as both go; {name} lacks 1 steps, the first is 4" in text


def test_what_cannot_be_compared(
    changed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = changed
    status, text = compare(capsys, a, tmp_path / "none")
    assert status == 2 and "none is not a run directory" in text and text.count("\n") == 1
    (file,) = (b / "checkpoints" / "step_00000004").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    status, text = compare(capsys, a, b)
    assert status == 2 and "step_00000004 is damaged" in text and text.count("\n") == 1
    shutil.rmtree(b / "checkpoints")
    (b / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 1.0}) + "\n")
    status, text = compare(capsys, a, b)
    assert status == 2 and "nothing to compare" in text
    (b / "metrics.jsonl").write_text("{\n")
    assert "not JSON" in compare(capsys, a, b)[1]
