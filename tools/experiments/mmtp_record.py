"""The tables and the picture of `tools.experiments.mmtp`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cogvit.report.chart import Series, running_mean, svg_picture
from tools.experiments.heads import DEPTHS, PLACES, Found
from tools.experiments.tables import spread, table

_LOSSES = ("loss", *(f"loss_mtp_{depth}" for depth in range(1, DEPTHS + 1)))
_EVERY = 4  # steps between two points of a curve
_SAID = {
    "across": "whose path crosses an image",
    "edge": "at an image's token or the one behind it, whose path crosses none",
    "text": "elsewhere in the text, where drafts are made",
}


@dataclass(frozen=True)
class Row:
    """What the seeds of one kind of run reached."""

    kind: str
    found: tuple[Found, ...]

    def held_out(self) -> list[str]:
        """Return the losses of the next token and of each depth."""
        return [spread([one.held_out[depth] for one in self.found]) for depth in range(len(self.found[0].held_out))]

    def at(self, place: str) -> list[str]:
        """Return each depth's loss of predictions that are made at a kind of place; "-" where there are none."""
        labels = self.found[0].labels[place]
        return [
            spread([one.places[place][depth] for one in self.found]) if labels[depth] else "-"
            for depth in range(len(labels))
        ]


def record(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the tables line by line."""
    with_heads = [row for row in rows if row.found[0].labels["text"]]
    yield f"Mean of {len(rows[0].found)} seeds ± their standard deviation. Held-out losses in nats a label."
    yield ""
    lines = []
    for row in rows:
        found, blank = row.found, ["-"] * (DEPTHS + 1)
        accepted = spread([one.accepted for one in found], ".2f")
        rough, largest = spread([one.roughness for one in found]), spread([one.largest_norm for one in found], ".1f")
        lines.append([row.kind, *(row.held_out() + blank)[: DEPTHS + 1], accepted, rough, largest])
    yield from table(["run", *_LOSSES, "accepted", "roughness", "largest norm"], lines)
    for place in PLACES:
        counts = ", ".join(f"{count:,}" for count in with_heads[0].found[0].labels[place])
        yield ""
        yield f"Predictions {_SAID[place]} ({counts} labels at the three depths):"
        yield ""
        yield from table(["run", *_LOSSES[1:]], [[row.kind, *row.at(place)] for row in with_heads])
    for way in ("joint", "alone"):
        lines = list(beside(way, with_heads))
        if not lines:
            continue
        yield ""
        yield f"Held-out losses beside those of `{way}_token_shared`, in percent: the mean, and each seed with itself:"
        yield ""
        yield from table(["run", *_LOSSES[1:]], lines)
    yield ""
    seconds = [one.cpu_s for row in rows for one in row.found]
    yield f"{len(seconds)} runs, {min(seconds):.0f} to {max(seconds):.0f} CPU s each, {sum(seconds) / 60:.0f} minutes."


def beside(way: str, rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield for every kind of run by how much its losses differ from those of the shared token, seed by seed."""
    bases = [row for row in rows if row.kind == f"{way}_token_shared"]
    for row in rows:
        if not bases or not row.kind.startswith(way) or row is bases[0]:
            continue
        cells = []
        for depth in range(1, DEPTHS + 1):
            pairs = zip(row.found, bases[0].found, strict=False)
            each = [100 * (one.held_out[depth] / base.held_out[depth] - 1) for one, base in pairs]
            cells.append(f"{statistics.mean(each):+.1f} ({', '.join(f'{value:+.1f}' for value in each)})")
        yield [row.kind, *cells]


def picture(rows: Sequence[Row]) -> str:
    """Return the training curves of joint runs with shared heads as SVG: the mean of the seeds, a chart a depth."""
    others = ("joint_tokens1_shared", "joint_tokens16_shared")
    shown = [row for row in rows if row.kind.startswith("joint_") and row.kind.endswith("_shared")]
    shown = [row for row in shown if row.kind not in others]
    charts = []
    for depth in range(1, DEPTHS + 1):
        lines = []
        for row in shown:
            own = [[step[depth] for step in one.curve] for one in row.found]
            smooth = running_mean([statistics.mean(values) for values in zip(*own, strict=True)])
            name = row.kind.removeprefix("joint_").removesuffix("_shared")
            lines.append(Series(name, range(0, len(smooth), _EVERY), smooth[::_EVERY], noisy=False))
        charts.append((f"{_LOSSES[depth]}, nats a label", lines))
    return svg_picture(charts)
