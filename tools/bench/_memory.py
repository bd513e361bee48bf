"""What processes hold."""

from __future__ import annotations

from pathlib import Path


def held_mb(process: int | str = "self") -> float:
    """Return the memory of a process that no file backs: its own (RssAnon), and shared memory that it has touched."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024
