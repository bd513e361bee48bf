"""Time and peak memory of a piece of work in this process, on Linux with glibc or on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Probe:
    """What one run took."""

    cpu_s: float  # of all threads: a busy neighbor distorts it less than a clock; on a GPU, by the clock
    peak_bytes: int  # above what the process held before; on a GPU, what torch held there


def probe(run: Callable[[], None], device: torch.device = _CPU) -> Probe:
    """Run once; device: where the work is done."""
    if device.type == "cuda":
        return _probe_gpu(run)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the allocator would hide this one's use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before_bytes = _memory_bytes("VmRSS")
    start_s = time.process_time()
    run()
    cpu_s = time.process_time() - start_s
    return Probe(cpu_s, _memory_bytes("VmHWM") - before_bytes)


def _probe_gpu(run: Callable[[], None]) -> Probe:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes, start_s = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    spent_s = time.perf_counter() - start_s
    return Probe(spent_s, torch.cuda.max_memory_allocated() - before_bytes)


def _memory_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (at the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
