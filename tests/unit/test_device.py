"""Where a process computes: a GPU that was promised and is not there is one line, never a silent CPU run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit.config import RunConfig
from cogvit.config.device import device_fault, device_flag, local_device, why_no_gpu
from cogvit.config.environment import Process
from cogvit.errors import ConfigError
from cogvit.stages import stage_of
from cogvit.stages.opening import slow_kernels
from cogvit.train import main
from tests.e2e.corpus import write_shards

ROOT = Path(__file__).parents[2]
LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that torch sees")


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No scheduler, no nvidia-smi but the tests' own, and variables that the test may leave changed."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def write_smi(directory: Path, *, listed: str = "", driver: str = "", status: int = 0) -> None:
    """An nvidia-smi that answers what the program asks."""
    script = directory / "nvidia-smi"
    lines = ("#!/bin/sh", 'case "$1" in', f"-L) echo '{listed}' ;;", f"*) echo '{driver}' ;;", "esac", f"exit {status}")
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)


def test_nobody_speaks_of_gpus() -> None:
    assert local_device("auto", Process()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_JOB_GPUS", "0"), ("SLURM_STEP_GPUS", "2,3"), ("SLURM_GPUS_ON_NODE", "8"), ("SLURM_GPUS", "16"),
        ("SLURM_GPUS_PER_NODE", "a100:4"), ("SLURM_GPUS_PER_TASK", "1"),
    ],
)  # fmt: skip
def test_slurm_gave_gpus(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=rf"Slurm gave GPUs \({name}={value}\), and torch .* sees none: .*--device cpu"
    ):
        local_device("auto", Process())
    assert local_device("cpu", Process()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_GPUS_PER_NODE", "0"), ("SLURM_GPUS_ON_NODE", ""), ("SLURM_GPUS", "a100:0")]
)
def test_slurm_gave_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert device_fault("auto") == ""


def test_nvidia_smi_lists_gpus(tmp_path: Path) -> None:
    write_smi(tmp_path, listed=LISTED)
    with pytest.raises(ConfigError, match=r"nvidia-smi lists 2 GPUs, and torch .* sees none"):
        local_device("auto", Process())


def test_an_nvidia_smi_without_a_driver_promises_nothing(tmp_path: Path) -> None:
    write_smi(tmp_path, listed="NVIDIA-SMI has failed", status=9)
    assert device_fault("auto") == ""
    write_smi(tmp_path, listed="No devices found.")
    assert device_fault("auto") == ""


def test_a_gpu_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"--device cuda asks for a GPU, and torch .* sees none"):
        local_device("cuda", Process())
    with pytest.raises(ConfigError, match="--device gpu must be one of auto, cuda, cpu"):
        device_flag("gpu")


def test_a_driver_that_is_too_old_for_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(tmp_path, listed=LISTED, driver="535.104.05\n535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # no wheel of CUDA can be installed beside this one
    told = device_fault("auto")
    assert "the driver 535.104.05 is too old for a wheel of CUDA 13.0, which needs 580.65.06" in told
    assert "update the driver or install a torch of an older CUDA, or pass --device cpu" in told and "\n" not in told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides them; unset it" in device_fault("auto")


@pytest.mark.parametrize(
    ("build", "driver", "visible", "told", "reason"),
    [
        (None, "535.1", "", "", "it is a CPU build"),
        ("12.8", "550.54.15", "-1", "", "CUDA_VISIBLE_DEVICES='-1' hides them"),
        ("12.8", "470.82.01", None, "", "driver 470.82.01 is too old for a wheel of CUDA 12.8, which needs 525.60.13"),
        ("12.8", "550.54.15", "GPU-1", "CUDA unknown error.\n (Triggered internally at x:1.)", "CUDA unknown error"),
        ("14.0", "no driver", "0,1", "", "the driver gives no reason; see nvidia-smi"),
    ],
)  # fmt: skip
def test_reasons(build: str | None, driver: str, visible: str | None, told: str, reason: str) -> None:
    said = why_no_gpu(build, driver, visible, told)
    assert reason in said and "\n" not in said and "Triggered" not in said


def test_a_run_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_smi(tmp_path, listed=LISTED)
    write_shards(tmp_path / "shards", "numbers-00000", 8)
    out = tmp_path / "run"
    size = ["--data.global-batch-images", "4"]
    command = [
        "demo_stage2",
        *size,
        "--data.shards",
        str(tmp_path / "shards"),
        "--eval.every-steps",
        "0",
        "--out",
        str(out),
    ]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nvidia-smi lists 2 GPUs") and not out.exists()
    assert main([*command, "--dry-run"]) == 0  # a login node need not have what the run will
    # A rank that does not speak for all still says what its machine lacks; its neighbors on it do not repeat it.
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank, local_rank, said in (("2", "0", 1), ("3", "1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        capsys.readouterr()
        assert main(command) == 2
        assert capsys.readouterr().err.count(f"error: rank {rank}: nvidia-smi lists 2 GPUs") == said


@pytest.mark.parametrize(("num_heads", "lines"), [(4, 1), (5, 0), (10, 0)])
def test_heads_that_flash_attention_does_not_take_are_said(num_heads: int, lines: int) -> None:
    config = RunConfig(precision="bf16")
    config = replace(config, vision=replace(config.vision, embed_dim=80, num_heads=num_heads))
    told = list(slow_kernels(stage_of(config), config, torch.device("cuda")))
    assert len(told) == lines
    assert all("vision has heads of 20 channels, and flash attention takes multiples of 8" in line for line in told)
    assert not list(slow_kernels(stage_of(config), config, torch.device("cpu")))


def check_node(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/check_node.sh", sys.executable, str(tmp_path / "out"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_node_is_refused_too(tmp_path: Path) -> None:
    write_smi(tmp_path, listed=LISTED)
    done = check_node(tmp_path, "auto")
    assert done.returncode == 2 and "nvidia-smi lists 2 GPUs, and torch " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert check_node(tmp_path, "cpu").returncode == 0


@pytest.mark.parametrize(("capability", "connections"), [("9.0", "1"), ("10.0", "32"), ("", "")])
def test_connections_that_tensor_parallelism_asks_for(tmp_path: Path, capability: str, connections: str) -> None:
    if capability:
        write_smi(tmp_path, driver=capability)
    command = ["bash", "-euo", "pipefail", "-c", 'source launch/env.sh; echo "$TP_CONNECTIONS"']
    environ = os.environ | {"SLURM_JOB_ID": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == connections
