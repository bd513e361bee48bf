"""A whole step of CogVLM2-19B's shapes on a CUDA device without data fits the layout that the planner names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvit.config import ParallelConfig
from cogvit.config.flags import load_preset
from cogvit.stages import stage_of
from configs.clusters import CLUSTERS
from tests.fake_cuda.fake import build_guard
from tools.step_cost import predict

PRESET, TP, DP = "cogvlm2_19b", 4, 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_1344_px_and_8k_tokens_fit_80_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the device guard (tests/fake_cuda/guard.cpp): none of c++, g++, clang++")
    build_guard(compiler, tmp_path / "guard.so")
    root = Path(__file__).parents[2]
    words = [str(tmp_path / "guard.so"), PRESET, "--tp", str(TP), "--dp", str(DP)]
    command = [sys.executable, "-m", "tests.fake_cuda.whole_step", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=870)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["total_gb"] < 80.0 and not found["waits"] and list(found["products"]) == ["torch.bfloat16"]
    monkeypatch.chdir(root)  # the preset names a folder of the checkout
    config = load_preset(PRESET)
    config = replace(config, parallel=ParallelConfig(tp=TP, sequence=True))
    planned = predict(config, stage_of(config).loads(config), TP * DP, TP * DP, CLUSTERS["h100"])
    assert planned.memory_bytes / 1e9 == pytest.approx(found["total_gb"], rel=0.05)
