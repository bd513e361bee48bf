"""Tables of Markdown for the records of experiments."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table of Markdown."""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean of the seeds and their standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"
