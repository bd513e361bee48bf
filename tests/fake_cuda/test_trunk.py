"""cogvit_l and a language model on a CUDA device without data: which kernels run, in which dtypes, what is kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvit.config import ActivationConfig, MemoryConfig
from cogvit.config.flags import load_preset
from cogvit.stages import stage_of
from cogvit.stages.cost import kept_bytes
from tests.fake_cuda.fake import build_guard
from tools.step_cost import KERNELS, MOVED_BYTES

Figures = dict[str, Any]
# Operators that raise on CUDA under torch.use_deterministic_algorithms: those of its documentation, as aten names them.
ATOMIC = re.compile(
    r"aten\.(upsample_(bi|tri)?(linear|cubic)\w*_backward|(avg|adaptive_\w+|fractional_max)_pool\dd\w*|max_unpool|put_"
    r"|nll_loss|_?ctc_loss|histc|median|grid_sampler\w*_backward|reflection_pad\w*_backward|bincount|cumsum|kthvalue)\b"
)
TOKENS = 16_384  # of a pack
# x / rms(x) of a block's two norms in fp32, which autograd keeps where RMS norm is no kernel but several: in torch
# without CUDA, also for a device that is not there.
NORMS_APART = 2 * TOKENS * 1024 * 4
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


@pytest.mark.parametrize(
    ("case", "depth", "fused", "tp"),
    [
        ("none", 24, False, 1),
        ("fused", 24, True, 1),
        ("selective", 4, False, 1),
        ("full", 24, False, 1),
        ("sequence_fused", 2, True, 2),
    ],
)
def test_the_planner_counts_what_is_kept(
    figures: dict[str, Figures], case: str, depth: int, fused: bool, tp: int
) -> None:
    """Within a twentieth (tensor ranks: a tenth), beside what embedding and, in torch without CUDA, norms keep."""
    recompute = case if case in ("selective", "full") else "none"
    config = load_preset("stage1_cogvit_l")
    memory = MemoryConfig(vision=ActivationConfig(recompute))  # type: ignore[arg-type]
    data = replace(config.data, tokens_per_pack=TOKENS)
    config = replace(config, data=data, memory=memory)
    (load,) = stage_of(config).loads(config)
    block = kept_bytes(load, tp, sequence=tp > 1, fused=fused, precision="bf16")
    embedding = TOKENS * (588 * 4 + 588 * 2 + 1024 * 4)  # patches normalized and cast, the first hidden states
    block += 0 if fused or case == "full" else NORMS_APART
    assert (depth * block + embedding) / 2**30 == pytest.approx(
        figures[case]["saved_gib"], rel=0.05 if tp == 1 else 0.1
    )


def test_selective_recompute_keeps_nothing_of_the_mlp(figures: dict[str, Figures]) -> None:
    """MiB of a block: two norms' fp32 inputs and bf16 results, q, k, v, what attention gives, two weights in bf16.

    And quotients of the norms. Of the MLP there is only its input, which is a norm's result.
    """
    block = (figures["selective"]["saved_gib"] - figures["selective_2"]["saved_gib"]) / 2 * 1024
    assert block - NORMS_APART / 2**20 == pytest.approx(2 * (64 + 32) + 96 + 32 + 6 + 2, abs=0.5)


def test_the_planner_counts_kernels_and_what_they_move(figures: dict[str, Figures]) -> None:
    """By the rates of the roofline: what is neither a product nor attention, of 24 blocks."""
    for case, fused in (("none", False), ("fused", True)):
        moved = 24 * TOKENS * 1024 * sum(MOVED_BYTES[fused])
        assert moved == pytest.approx(figures[case]["other_bytes"], rel=0.1)
        assert 24 * sum(KERNELS[fused]) == pytest.approx(figures[case]["kernels"], rel=0.1)


def test_a_language_model_runs_in_bf16_and_waits_for_nothing(figures: dict[str, Figures]) -> None:
    """Two layers of GLM-4-9B and its head, on two tensor ranks with sequence parallelism."""
    found = figures["language"]
    assert found["forward"][VARLEN] == 2
    assert list(found["products"]) == ["torch.bfloat16"]
    assert found["out"] == "torch.float32" and found["gradients"] == ["torch.float32"]
    assert not found["waits"]
    assert not [message for message in found["collectives"] if len(set(message[1])) > 1]


def test_no_operator_lacks_a_deterministic_form(figures: dict[str, Figures]) -> None:
    for name in ("none", "full", "sequence"):
        assert not [call for call in figures[name]["calls"] if ATOMIC.match(call)], name
    table = figures["table"]
    assert "aten.upsample_bicubic2d_backward.default" in table["False"]
    assert not [call for call in table["True"] if ATOMIC.match(call)]
