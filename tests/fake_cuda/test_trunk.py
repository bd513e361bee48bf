"""cogvit_l and a language model on a CUDA device without data: which kernels run, in which dtypes, what is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.fake import build_guard

Figures = dict[str, Any]
VARLEN = "torch_attn._varlen_attn.default"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figures]:
    """What `tests.fake_cuda.measure` prints; skips where nothing compiles the guard."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the device guard (tests/fake_cuda/guard.cpp): none of c++, g++, clang++")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    build_guard(compiler, library)
    command = [sys.executable, "-m", "tests.fake_cuda.measure", str(library)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


pytestmark = pytest.mark.timeout(300)


def test_every_layer_calls_the_varlen_kernel_once(figures: dict[str, Figures]) -> None:
    forward = figures["none"]["forward"]
    assert forward[VARLEN] == 24
    assert not [name for name in forward if "scaled_dot_product" in name or "softmax" in name]


def test_every_product_is_bf16_and_what_it_gives_to_the_outside_fp32(figures: dict[str, Figures]) -> None:
    for name in ("none", "full", "sequence"):
        assert list(figures[name]["products"]) == ["torch.bfloat16"], name
        assert figures[name]["out"] == "torch.float32"
        assert figures[name]["gradients"] == ["torch.float32"]


def test_bytes_kept_for_backward(figures: dict[str, Figures]) -> None:
    """One pack of 16,384 tokens through 24 layers."""
    assert 10.0 < figures["none"]["saved_gib"] <= 30.0
    assert figures["full"]["saved_gib"] <= 8.0


def test_fused_pieces_bring_a_step_near_its_products(figures: dict[str, Figures]) -> None:
    """By the rates of an H100, each fused piece one kernel that reads its inputs and writes its outputs: a model."""
    plain, fused = figures["none"], figures["fused"]
    assert 70.0 < fused["milliseconds"] <= 125.0 < plain["milliseconds"]
    assert fused["saved_gib"] <= 24.0
    assert fused["kernels"] < plain["kernels"] / 3


def test_a_message_goes_out_in_the_dtype_in_which_it_comes_in(figures: dict[str, Figures]) -> None:
    """NCCL takes no other; gloo, under the tests on CPU, does."""
    messages = figures["sequence"]["collectives"]
    kinds = [name.split(".")[1] for name, _ in messages]
    assert {"_allgather_base_", "_reduce_scatter_base_"} <= set(kinds)
    assert not [message for message in messages if len(set(message[1])) > 1]


def test_a_language_model_runs_in_bf16_and_waits_for_nothing(figures: dict[str, Figures]) -> None:
    """Two layers of GLM-4-9B and its head, on two tensor ranks with sequence parallelism."""
    found = figures["language"]
    assert found["forward"][VARLEN] == 2
    assert list(found["products"]) == ["torch.bfloat16"]
    assert found["out"] == "torch.float32" and found["gradients"] == ["torch.float32"]
    assert not found["waits"]
    assert not [message for message in found["collectives"] if len(set(message[1])) > 1]
