"""The figures of an evaluation as tables: a row a figure, its baselines and chance beside it, what matters first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cogvit.evaluation.results import PLAIN, Evaluation, Score

_BASELINES = {  # a metric that ends so belongs to the metric without it
    "untrained": "the same encoder before training",
    "pixels": "the image itself, made small",
    "color": "an image's colors alone, a caption being those of the training images that have it",
    "place": "the mean of what other images have at the place of a patch",
    "without_image": "the same model, shown none",
}
# Metrics that end so are a click away: one recall is enough to begin with, and a gap is the difference of two columns.
_FURTHER = ("_r1", "_r10", "_usual", "_gap")
_PARTS = {  # what a table is about -> its tasks
    "Answers about images; chance is the same model's, shown another image": ("caption", "vqa"),
    "Images and texts": ("zeroshot", "retrieval"),
    "Classes of frozen features": ("knn", "linear"),
    "Nats a token of the right answers, the fewer the better; chance is with another image": ("perplexity",),
    "What of the teachers is explained": ("distill",),
}


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation with its baselines, by name."""

    task: str
    metric: str
    score: Score
    beside: Mapping[str, float]


def evaluation_table(evaluation: Evaluation) -> str:
    """Return tables that a reader can sort by any column, and the finer figures behind a click; empty without any."""
    figures = [
        Figure(task, metric, score, _beside(metric, metrics))
        for task, metrics in evaluation.items()
        for metric, score in metrics.items()
        if not metric.endswith(tuple(f"_{name}" for name in _BASELINES))
    ]
    if not figures:
        return ""
    told = "".join(f" {_spelt(name)}: {_BASELINES[name]}." for name in _columns(figures))
    known = tuple(task for tasks in _PARTS.values() for task in tasks)
    others = {"Others": [figure for figure in figures if not figure.task.startswith(known)]}
    parts = {title: [one for one in figures if one.task.startswith(tasks)] for title, tasks in _PARTS.items()} | others
    return (
        f"<p><small>The mark in a bar is chance; a click on a column's name sorts by it.{told}</small></p>"
        f"{''.join(_part(title, own) for title, own in parts.items() if own)}"
    )


def _part(title: str, figures: Sequence[Figure]) -> str:
    first = [figure for figure in figures if not figure.metric.endswith(_FURTHER)]
    rest = [figure for figure in figures if figure.metric.endswith(_FURTHER)]
    more = f"<details><summary>{len(rest)} further figures</summary>{_table(rest)}</details>" if rest else ""
    return f"<h3>{escape(title)}</h3>{_table(first) if first else ''}{more}"


def _spelt(name: str) -> str:
    return name.replace("_", " ")


def _columns(figures: Sequence[Figure]) -> list[str]:
    """The baselines that some figure has."""
    return [name for name in _BASELINES if any(name in figure.beside for figure in figures)]


def _table(figures: Sequence[Figure]) -> str:
    columns = _columns(figures)
    heads = "".join(f'<th class="num sorts">{_spelt(name)}</th>' for name in ("value", "chance", *columns))
    rows = "".join(_row(figure, columns) for figure in figures)
    return (
        f'<div class="wide"><table><thead><tr><th class=sorts>task</th>{heads}<th class=bar></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _beside(metric: str, metrics: Mapping[str, Score]) -> dict[str, float]:
    """The baselines of a metric, by column."""
    return {name: metrics[f"{metric}_{name}"]["value"] for name in _BASELINES if f"{metric}_{name}" in metrics}


def _row(figure: Figure, columns: Sequence[str]) -> str:
    value, chance = figure.score["value"], figure.score["chance"]
    plain = figure.metric.startswith(PLAIN)
    others = "".join(_cell(figure.beside.get(name), plain=plain) for name in columns)
    bar = f'<div><b style="width:{_percent(value)}"></b><i style="left:{_percent(chance)}"></i></div>'
    bar = "" if plain else bar
    return (
        f"<tr><td>{_wrapping(figure.task)}<br><small>{_wrapping(figure.metric)}</small></td>"
        f"{_cell(value, bold=True, plain=plain)}{_cell(chance, plain=plain)}{others}<td class=bar>{bar}</td></tr>"
    )


def _wrapping(name: str) -> str:
    """A name that a narrow page may break behind its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _cell(value: float | None, *, bold: bool = False, plain: bool = False) -> str:
    if value is None:
        return '<td class=num data-value=""></td>'
    shown = f"{value:.3f}" if plain else f"{100 * value:.1f}&#8239;%"
    return f'<td class=num data-value="{value!r}">{f"<b>{shown}</b>" if bold else shown}</td>'


def _percent(value: float) -> str:
    """Return a CSS width or position inside its box."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
