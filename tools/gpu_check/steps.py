"""What a training step of cogvit_l takes: time, share of the peak, memory, waits; and what the optimizer does."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable

import torch

from cogvit.parallel.mesh import Mesh
from cogvit.stages import build
from cogvit.training.engine import Engine, StepReport
from cogvit.training.orthogonal import newton_schulz
from tools.gpu_check.machine import bf16_flops_per_s
from tools.gpu_check.work import (
    TEACHER_DIMS,
    Figures,
    Setting,
    one_mesh,
    pack_of,
    peak_flops_per_s,
    peak_gib,
    run_config,
    timed_ms,
)

_ROUNDS = 5


def steps(setting: Setting) -> Figures:
    """Time stage 1's step on one pack in bf16: packs of 8,192 and 16,384 tokens, each recompute, pieces not fused."""
    sizes = (128,) if setting.small else (8_192, 16_384)
    fused = "off" if setting.small else "on"
    rows, ceiling = [], bf16_flops_per_s(setting)
    with one_mesh(setting) as mesh:
        for num_tokens in sizes:
            for recompute in ("none", "selective", "full"):
                rows.append(_row(setting, mesh, num_tokens, recompute, fused, ceiling))
            if not setting.small:
                rows.append(_row(setting, mesh, num_tokens, "none", "off", ceiling))
    return {"bf16_ceiling_tflops": ceiling / 1e12, "steps": rows}


def _row(setting: Setting, mesh: Mesh, num_tokens: int, recompute: str, fusion: str, ceiling: float) -> Figures:
    """One layout of the step; MFU counts 3 forwards, whatever is done again."""
    row: Figures = {"tokens": num_tokens, "recompute": recompute, "fusion": fusion}
    if not setting.small:
        row["held_before_gib"] = torch.cuda.memory_allocated() / 2**30  # what an earlier row has left
    try:
        step, forward_flops = _stepper(setting, mesh, num_tokens, recompute, fusion)
        for _ in range(1 if setting.small else 3):  # compiles, and fills the allocator
            step()
        reports: list[StepReport] = []
        whole_ms = timed_ms(lambda: reports.append(step()), setting.device, 1 if setting.small else _ROUNDS)
        del reports[0]  # of the run before those that are timed
        row |= {
            "step_ms": whole_ms,
            "forward_backward_ms": 1e3 * statistics.median(report.forward_backward_s for report in reports),
            "optimizer_ms": 1e3 * statistics.median(report.optimizer_s for report in reports),
        }
        flops_per_s = 3e3 * forward_flops / row["forward_backward_ms"]
        sheet = peak_flops_per_s(setting.device)
        row |= {"mfu": sheet and flops_per_s / sheet, "of_ceiling": flops_per_s / ceiling}
        row |= {"tokens_per_s": 1e3 * num_tokens / whole_ms, "peak_gib": peak_gib(step, setting.device)}
        row["host_waits"] = host_waits(step, setting)
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).partition(".")[0]
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
        if not setting.small:
            torch.cuda.empty_cache()
    return row


def _stepper(
    setting: Setting, mesh: Mesh, num_tokens: int, recompute: str, fusion: str
) -> tuple[Callable[[], StepReport], float]:
    config = run_config(setting, num_tokens, recompute=recompute, fusion=fusion)
    model, objective = build(config, mesh, TEACHER_DIMS)
    engine = Engine(model, config, mesh)
    batch, flops = pack_of(setting, num_tokens, seed=1)
    return lambda: engine.step(objective, (batch,), 200), flops


def host_waits(step: Callable[[], object], setting: Setting) -> int | None:
    """Count how often the host waits for the device in a step, as torch notices; None on a CPU."""
    if setting.small:
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def optimizer(setting: Setting) -> Figures:
    """Time Newton-Schulz on a block's matrices, one by one and a bucket together; the whole update is in `steps`."""
    width, mlp = setting.vision.embed_dim, setting.vision.mlp_dim
    rows = []
    for name, shape in (("attention", (width, width)), ("MLP", (mlp, width)), ("8 of the MLP", (8, mlp, width))):
        matrices = torch.randn(shape, device=setting.device)
        spent_ms = timed_ms(lambda m=matrices: newton_schulz(m), setting.device)  # type: ignore[misc]
        values = torch.linalg.svdvals(newton_schulz(matrices).float())
        found = {"matrix": name, "shape": "x".join(map(str, shape)), "ms": spent_ms}
        rows.append(found | {"least_singular": float(values.min()), "largest_singular": float(values.max())})
    return {"newton_schulz": rows}
