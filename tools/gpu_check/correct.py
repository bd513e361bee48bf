"""Whether numbers are right: attention against fp64, gradients in bf16 against fp32, which kernels run, `tests/gpu`."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvit.model.attention import Segments, packed_attention, segments_of
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.schedule import Schedule
from cogvit.stages import build
from tools.gpu_check.work import TEACHER_DIMS, Figures, Setting, one_mesh, pack_of, run_config, synchronize, timed_ms

ROOT = Path(__file__).parents[2]
# Those of tests/gpu that need seconds; layouts and stages start processes and have sections of their own here.
_QUICK_TESTS = ("test_attention.py", "test_encoder.py", "test_pinned.py", "test_teacher.py")
_TESTS_LIMIT_S = 150.0


def attention(setting: Setting) -> Figures:
    """Compare packed attention of ragged images with softmax in fp64, outputs and gradients, and time it."""
    dtype = torch.float32 if setting.small else torch.bfloat16
    rows = []
    for head_dim in (64, 72, 128):
        lengths = [37, 1, 16, 64] if setting.small else [1024, 1, 333, 777, 256, 64]
        given = _random_qkv(sum(lengths) + 11, 2, head_dim, dtype, setting.device)
        bounds = torch.tensor([0, *lengths, 11], device=setting.device).cumsum(0).to(torch.int32)
        out = packed_attention(given[0], given[1], given[2], segments_of(bounds))
        exact = [x.detach().double().requires_grad_() for x in given]
        expected = torch.cat([*map(_softmax, *(x[: sum(lengths)].split(lengths) for x in exact))])
        weight = torch.randn(expected.shape, device=setting.device, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad((out[: sum(lengths)] * weight).sum(), given)
        wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
        pairs = zip(("out", "q", "k", "v"), (out[: sum(lengths)], *grads), (expected, *wanted), strict=True)
        rows.append({"head_dim": head_dim} | {name: _relative(mine, other) for name, mine, other in pairs})
    return {"dtype": str(dtype), "relative_errors": rows, "speed": _attention_speed(setting, dtype)}


def _attention_speed(setting: Setting, dtype: torch.dtype) -> list[Figures]:
    rows = []
    for num_tokens in (256,) if setting.small else (8_192, 16_384):
        length = min(512, num_tokens // 2)
        heads, head_dim = setting.vision.num_heads, setting.vision.head_dim
        given = _random_qkv(num_tokens, heads, head_dim, dtype, setting.device)
        bounds = torch.arange(0, num_tokens + 1, length, device=setting.device, dtype=torch.int32)
        segments = segments_of(torch.cat([bounds, bounds[-1:]]))

        def forward(given: list[Tensor] = given, segments: Segments = segments) -> Tensor:
            return packed_attention(given[0], given[1], given[2], segments)

        def both(forward: Callable[[], Tensor] = forward, given: list[Tensor] = given) -> None:
            torch.autograd.grad(forward().sum(), given)

        with torch.no_grad():
            forward_ms = timed_ms(forward, setting.device)
        both_ms, flops = timed_ms(both, setting.device), 4.0 * num_tokens * length * heads * head_dim
        rows.append(
            {"tokens": num_tokens, "image_tokens": length, "forward_ms": forward_ms, "forward_backward_ms": both_ms,
             "forward_tflops": flops / forward_ms / 1e9, "forward_backward_tflops": 3.5 * flops / both_ms / 1e9}
        )  # fmt: skip
    return rows


def gradients(setting: Setting) -> Figures:
    """Compare every gradient of the trunk in bf16 with fp32's: the worst tensors, and the median."""
    num_tokens = 128 if setting.small else 4096
    with one_mesh(setting) as mesh:
        (exact, loss), (rounded, rounded_loss) = (
            _gradients(setting, mesh, num_tokens, precision) for precision in ("fp32", "bf16")
        )
    largest = max(float(gradient.norm()) for gradient in exact.values())
    errors = {
        name: float((rounded[name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * largest)
        for name, gradient in exact.items()
    }
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:8]
    return {
        "loss_fp32": loss,
        "loss_bf16": rounded_loss,
        "tensors": len(errors),
        "median_error": statistics.median(errors.values()),
        "without_a_gradient": [name for name, gradient in exact.items() if not gradient.any()],
        "not_fp32": [name for name, gradient in rounded.items() if gradient.dtype != torch.float32],
        "worst": [{"tensor": name, "relative_error": errors[name]} for name in worst],
    }


def _gradients(setting: Setting, mesh: Mesh, num_tokens: int, precision: str) -> tuple[dict[str, Tensor], float]:
    model, step = forward_backward(setting, mesh, num_tokens, precision=precision)
    loss = step()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}, loss


def forward_backward(setting: Setting, mesh: Mesh, num_tokens: int, **changes: Any) -> tuple[nn.Module, Any]:
    """Return stage 1's model and a function that runs one pack forward and backward and returns the loss."""
    config = run_config(setting, num_tokens, **changes)
    model, objective = build(config, mesh, TEACHER_DIMS)
    batch, _ = pack_of(setting, num_tokens, seed=1)
    schedule = Schedule(mesh, config.precision)

    def step() -> float:
        model.zero_grad()
        return float(objective.train(model, (batch,), schedule)["loss"])

    return model, step


def kernels(setting: Setting) -> Figures:
    """Profile one forward and backward of the tower in bf16: which kernels take the time, and how often flash runs."""
    from torch.profiler import ProfilerActivity, profile

    num_tokens = 128 if setting.small else 16_384
    activities = [ProfilerActivity.CPU] if setting.small else [ProfilerActivity.CUDA]
    found: Figures = {"layers": setting.vision.depth}
    with one_mesh(setting) as mesh:
        for fusion in ("off",) if setting.small else ("off", "on"):
            _, step = forward_backward(setting, mesh, num_tokens, fusion=fusion)
            step()
            with profile(activities=activities) as profiled:
                step()
                synchronize(setting.device)
            found[f"fusion_{fusion}"] = _shares(profiled, setting)
            del step
    return found


def _shares(profiled: Any, setting: Setting) -> Figures:
    spent_us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiled.key_averages():
        spent_us[event.key] += event.self_cpu_time_total if setting.small else event.self_device_time_total
        calls[event.key] += event.count
    total_us = sum(spent_us.values()) or 1.0
    flash = {name: count for name, count in calls.items() if re.search("flash|fmha", name, re.IGNORECASE)}
    products = sum(us for name, us in spent_us.items() if re.search("gemm|nvjet|cutlass|::b?mm|addmm", name))
    return {
        "kernels": sum(calls.values()),
        "device_ms": total_us / 1e3,
        "share_of_products": products / total_us,
        "share_of_flash_attention": sum(spent_us[name] for name in flash) / total_us,
        "flash_calls": {name[:100]: count for name, count in flash.items()},
        "longest": [
            {"kernel": name[:100], "calls": calls[name], "ms": us / 1e3} for name, us in spent_us.most_common(15)
        ],
    }


def gpu_tests(setting: Setting) -> Figures:
    """Run those of tests/gpu that take seconds; what is over its time is what it got to."""
    if find_spec("pytest") is None:
        return {"missing": "pytest is not installed"}
    files = [str(ROOT / "tests" / "gpu" / name) for name in (_QUICK_TESTS[:1] if setting.small else _QUICK_TESTS)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-v",
        "-rs",
        "--durations=0",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    log = setting.out / "tests_gpu.txt"
    with log.open("w") as output:
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=_TESTS_LIMIT_S
            )
            status = str(run.returncode)
        except subprocess.TimeoutExpired:
            status = f"stopped after {_TESTS_LIMIT_S:g} s"
    said = log.read_text()
    counts = Counter(re.findall(r" (PASSED|FAILED|SKIPPED|ERROR)\b", said))
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return {"status": status, "log": log.name, "failed": failed[:20]} | {
        name.lower(): counts[name] for name in ("PASSED", "FAILED", "SKIPPED", "ERROR")
    }


def _random_qkv(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = (torch.randn(num_tokens, heads, head_dim, generator=generator) for _ in range(3))
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _softmax(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
    score_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * q_THK.shape[-1] ** -0.5
    return torch.einsum("hts,shk->thk", score_HTT.softmax(-1), v_THK)


def _relative(mine: Tensor, other: Tensor) -> float:
    return float((mine.detach().double() - other.detach()).norm() / other.detach().norm())
