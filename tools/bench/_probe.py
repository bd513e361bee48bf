"""CPU time and peak memory of a piece of work in this process, on Linux with glibc."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Probe:
    """What one run took."""

    cpu_s: float  # of all threads: a busy neighbor distorts it less than a clock
    peak_bytes: int  # above what the process held before


def probe(run: Callable[[], None]) -> Probe:
    """Run once."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the allocator would hide this one's use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before_bytes = _memory_bytes("VmRSS")
    start_s = time.process_time()
    run()
    cpu_s = time.process_time() - start_s
    return Probe(cpu_s, _memory_bytes("VmHWM") - before_bytes)


def _memory_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (at the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
