"""The tables and the picture of `tools.experiments.expert`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cogvit.report.chart import Series, running_mean, svg_picture
from tools.experiments.expert_runs import Found
from tools.experiments.tables import spread, table

_EVERY = 5  # steps between two points of a curve


@dataclass(frozen=True)
class Row:
    """What the seeds of one kind of run reached."""

    kind: str
    found: tuple[Found, ...]

    def cells(self, languages: Sequence[str]) -> list[str]:
        """Return its line of the table."""
        shares = [[getattr(one, name) for one in self.found] for name in ("captions", "boxes")]
        cells = [f"{spread([seen for seen, _ in own], '.1%')} ({_mean(own, 1):.1%})" for own in shares]
        cells += [self.perplexity(language) for language in languages]
        return [self.kind, *cells, f"{self.found[0].trained:,}", spread([one.cpu_s for one in self.found], ".0f")]

    def perplexity(self, language: str) -> str:
        """Return that of texts alone after the runs; "equal" where no run has changed a bit of it."""
        nats = [one.nats[language] for one in self.found]
        if all(after == before for after, before in nats):
            return f"equal ({math.exp(nats[0][1]):.2f})"
        return f"{spread([math.exp(after) for after, _ in nats], '.2f')} ({math.exp(_mean(nats, 1)):.2f})"


def _mean(pairs: Sequence[Sequence[float]], place: int) -> float:
    return statistics.mean(pair[place] for pair in pairs)


def record(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the tables line by line."""
    languages = list(rows[0].found[0].nats)
    yield (
        f"Mean of {len(rows[0].found)} seeds ± their standard deviation; in brackets the same shown another picture,"
        " and of texts alone the perplexity before the run."
    )
    yield ""
    perplexities = [f"texts alone, {language}" for language in languages]
    yield from table(
        ["run", "captions, exact", "boxes, IoU at 0.5", *perplexities, "trained weights", "CPU s"],
        [row.cells(languages) for row in rows],
    )
    yield ""
    yield "Each seed by itself:"
    yield ""
    yield from table(
        ["run", "captions, exact", "boxes, IoU at 0.5"],
        [
            [
                row.kind,
                *(", ".join(f"{getattr(one, name)[0]:.1%}" for one in row.found) for name in ("captions", "boxes")),
            ]
            for row in rows
        ],
    )


def picture(rows: Sequence[Row]) -> str:
    """Return training losses and what images are worth as SVG: the mean of the seeds."""
    losses, seeing = [], []
    for row in rows:
        steps, means = _curve([one.curve for one in row.found])
        losses.append(Series(row.kind, steps[::_EVERY], running_mean(means)[::_EVERY], noisy=False))
        seeing.append(Series(row.kind, *_curve([one.seeing for one in row.found]), noisy=False))
    return svg_picture([("training loss, nats a label", losses), ("what images are worth, nats a label", seeing)])


def _curve(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """The steps of some equally long curves, and the mean of their values."""
    steps = [point[0] for point in curves[0]]
    return steps, [_mean(points, 1) for points in zip(*curves, strict=True)]
