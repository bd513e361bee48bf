"""Commands on a terminal, and the lines in their output that a dependency printed."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

# Warnings of Python, log lines of glog, gloo, DeepSpeed, Ray and wandb, and paths inside the environment.
_DEPENDENCY = re.compile(
    r"\w+Warning:|warnings\.warn|/site-packages/|deprecat|^\s*\[?[WIE]\d{4} |\[Gloo\]|\[c10d|\[rank\d|\(\w+ pid="
    r"|\[\d{4}-\d\d-\d\d [\d:,]+\]|\b(INFO|WARNING|DEBUG)\b|^wandb:|resource_tracker|NCCL|Traceback",
    re.MULTILINE,
)


def noise_of(output: str) -> list[str]:
    """Return the lines of a dependency; what a progress bar wrote over counts as a line of its own."""
    return [line for line in re.split(r"[\r\n]+", output) if _DEPENDENCY.search(line)]


def on_terminal(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command with a terminal as its input and outputs; returns its status and all that it wrote there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))  # a new one has no columns, and a bar no place
    process = subprocess.Popen(
        command, cwd=cwd, env={**environment, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the last process has closed it
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    return process.wait(), written.decode(errors="replace")
