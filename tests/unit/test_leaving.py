"""Where ranks find their GPU, Ray its directory, and what a closed terminal asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvit.config.environment import Process, device_index
from cogvit.errors import ConfigError
from cogvit.teacher.scratch import scratch
from cogvit.train import main
from cogvit.training.checkpoint import _reason
from cogvit.training.signals import StopRequest

ROOT = Path(__file__).parents[2]


def test_a_process_that_sees_one_gpu_takes_it() -> None:
    assert device_index(Process(rank=3, world_size=4, local_rank=3), num_visible=1) == 0
    assert device_index(Process(rank=3, world_size=4, local_rank=3), num_visible=8) == 3
    with pytest.raises(ConfigError, match="LOCAL_RANK=3 finds 2 GPUs; start one process a GPU"):
        device_index(Process(rank=3, world_size=4, local_rank=3), num_visible=2)


def test_a_closed_terminal_asks_for_a_save_and_nohup_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        deadline_s = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert stop.requested
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not stop.requested
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("base", ["/tmp/" + 40 * "x", "/nowhere"])
def test_a_directory_in_which_ray_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", base)
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR={base} .*(at most 25|No such file or directory)"), scratch():
        pass


def local(module: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/local.sh", "1", module, *argv]
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


def test_local_means_local_and_takes_the_tools() -> None:
    said = local("tools.doctor", "--help", MASTER_ADDR="192.0.2.1", SLURM_STEP_NUM_TASKS="4")
    assert said.returncode == 0 and "doctor" in said.stdout, said.stderr


def test_a_preset_that_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "x"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the preset is missing before --out") and "demo_stage1" in told


def test_home_is_expanded_behind_an_equals_sign(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["demo_stage2", "--data.shards=~/none", "--eval.every-steps", "0"]) == 2
    assert f"shard {tmp_path}/none does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--init", "EMPTY"], ["--init", "absent"], ["--data.shards", "absent"]])
def test_a_dry_run_refuses_what_a_start_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    flags = [flags[0], str(tmp_path / flags[1]), "--eval.every-steps", "0"]
    assert main(["demo_stage2", *flags, "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and str(tmp_path) in told[0]


def test_a_store_and_teachers_that_are_absent_are_refused_early(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    heavy = {"transformers", "megatron", "deepspeed", "ray"}.isdisjoint
    before = heavy(sys.modules)
    for member in ("siglip2", "dinov3"):
        (tmp_path / member).mkdir()
    paths = [f"--teachers.members.{name}.path={tmp_path}/{name}" for name in ("siglip2", "dinov3")]
    absent = ["--teachers.source", "store", "--teachers.store", str(tmp_path / "absent"), "--dry-run"]
    assert main(["demo_stage1", *paths, *absent]) == 2
    assert f"the store has no {tmp_path}/absent/siglip2/manifest.json" in capsys.readouterr().err
    assert main(["demo_stage1", "--teachers.members.dinov3.path", str(tmp_path / "none" / "x"), "--dry-run"]) == 2
    assert "teacher" in capsys.readouterr().err
    assert heavy(sys.modules) == before


def test_a_full_disk_is_the_cause_alone() -> None:
    noise = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
    assert _reason(RuntimeError(f"stack\n{noise}")) == ""
    assert _reason(RuntimeError("stack\nOSError: No space left on device")) == "OSError: No space left on device"
