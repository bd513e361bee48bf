"""The command line of a benchmark whose output is its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from cogvit.config.arguments import run_command


class Recorded(Protocol):
    """The flags of a benchmark; `--out FILE` also writes the record there."""

    @property
    def out(self) -> str:
        """The file, or "" for none."""
        ...


Flags = TypeVar("Flags", bound=Recorded)


def run_benchmark(argv: list[str], usage: str, kind: type[Flags], report: Callable[[Flags], Iterator[str]]) -> int:
    """Print the lines of a report as they come, and write them to --out at the end; returns the exit status."""

    def record(arguments: Flags) -> int:
        lines = []
        for line in report(arguments):
            print(line, flush=True)
            lines.append(line)
        if arguments.out:
            Path(arguments.out).write_text("\n".join(lines) + "\n")
        return 0

    return run_command(argv, usage, kind, record)


def flags_of(arguments: Recorded) -> str:
    """Return the flags that reproduce a record, `--out` left out."""
    return " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(arguments).items() if name != "out" and value
    )
