"""Whether processes of others have ended."""

from __future__ import annotations

import time
from pathlib import Path


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody collects does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended_in_time(pid: int, seconds: float = 20.0) -> bool:
    """Wait for the end of a process."""
    end_s = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not running(pid)
