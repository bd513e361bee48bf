"""`tools.gpu_check` on a CPU: every section runs small, and one that fails does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvit.stages import check_run, read_run
from cogvit.stages.cost import attention_flops, product_flops
from tests.processes import ended_in_time
from tools.gpu_check.__main__ import SECTIONS, watched
from tools.gpu_check.runs import trainer_words
from tools.gpu_check.work import Setting

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(400)


def check(out: Path, *flags: str, status: int = 0, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The sections that the command leaves, by name. Started elsewhere: a bare checkout on PYTHONPATH is enough."""
    command = [sys.executable, "-m", "tools.gpu_check", "--out", str(out), "--device", device, *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out.parent, env=environ, capture_output=True, text=True, timeout=390)
    assert done.returncode == status, done.stdout + done.stderr[-2000:]
    written = json.loads((out / "gpu_check.json").read_text())["sections"] if out.is_dir() else []
    return {section["name"]: section for section in written} | {"printed": {"text": done.stdout + done.stderr}}


def test_every_section_runs_small(tmp_path: Path) -> None:
    found = check(tmp_path / "check")
    assert {name: found[name]["status"] for name in SECTIONS} == dict.fromkeys(SECTIONS, "ok")
    figures = {name: found[name]["figures"] for name in SECTIONS}
    assert figures["machine"]["packages"]["deepspeed"] != "missing"
    for row in figures["attention"]["relative_errors"]:
        assert max(row[name] for name in ("out", "q", "k", "v")) < 1e-5
    gradients = figures["gradients"]
    assert 0.0 < gradients["median_error"] < 0.05 and gradients["loss_bf16"] != gradients["loss_fp32"]
    assert not gradients["without_a_gradient"] and not gradients["not_fp32"]
    assert [row["recompute"] for row in figures["steps"]["steps"]] == ["none", "selective", "full"]
    assert all(row["step_ms"] >= row["forward_backward_ms"] > 0.0 for row in figures["steps"]["steps"])
    assert figures["kernels"]["fusion_off"]["kernels"] > 100
    assert figures["stages"]["store"]["files"] == 4  # two teachers, two shards
    for stage in ("stage1", "stage2"):
        assert figures["stages"][stage]["ended"] and figures["stages"][stage]["stopped"]
    repeated = figures["deterministic"]
    assert repeated["losses_equal_to_the_bit"] and repeated["weights_that_differ"] == []
    assert "transformers, by length" in [row["encoder"] for row in figures["peers"]["encoders"]]
    assert figures["gpu_tests"]["skipped"] + figures["gpu_tests"]["passed"] > 10
    readable = (tmp_path / "check" / "gpu_check.txt").read_text()
    assert all(f"== {name}" in readable for name in SECTIONS)


def test_a_section_that_fails_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "check"
    out.mkdir()
    (out / "work").write_text("in the way of the stages' directory")
    found = check(out, "--sections", "stages,machine", status=1)
    assert found["stages"]["status"].startswith("failed: FileExistsError")
    assert "Traceback" in found["stages"]["trace"] and found["machine"]["status"] == "ok"
    assert "1 of 2 sections ended well" in found["printed"]["text"]


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found = check(tmp_path / "check", "--sections", "machine", "--limit-s", "1", status=1)
    assert "the process died or took more than 1 s" in found["machine"]["status"]


def test_nothing_that_a_worker_started_holds_the_gpu_after_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    watched(["sh", "-c", f"sleep 60 & echo $! > {told}; wait"], tmp_path, limit_s=0.5)
    assert ended_in_time(int(told.read_text()))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_commands_of_a_gpu_are_a_run(tmp_path: Path, stage: int) -> None:
    """What a CPU does not train: cogvit_l's width and depth in packs of 8,192 tokens."""
    setting = Setting(torch.device("cuda"), tmp_path)
    preset, *flags = trainer_words(stage, tmp_path, tmp_path / "out", 20, setting)
    config = read_run(preset, flags)
    check_run(config, 1)
    assert (config.vision.embed_dim, config.vision.depth) == (1024, 24) and config.device == "cuda"
    assert (product_flops(setting.vision, 16_384) + attention_flops(setting.vision, 16_384, 512)) > 10e12


def test_results_that_can_go_nowhere_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    printed = check(tmp_path / "file", status=2)["printed"]["text"]
    assert "cannot be made (File exists); pass another directory" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "device", "reason"),
    [
        (("--sections", "machine,none"), "cpu", "--sections none is none of machine, "),
        (("--limit-s", "0"), "cpu", "--limit-s 0 must be a whole number of seconds"),
        ((), "cuda", "--device cuda asks for a GPU, and torch "),
    ],
)
def test_bad_flags_are_one_line(tmp_path: Path, flags: tuple[str, ...], device: str, reason: str) -> None:
    printed = check(tmp_path / "none", *flags, status=2, device=device)["printed"]["text"]
    assert printed.startswith("error: ") and reason in printed and len(printed.splitlines()) == 1
