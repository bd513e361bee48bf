"""The figures of an evaluation as one table: a row a figure, with its baselines and chance beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from cogvit.evaluation.results import PLAIN, Evaluation, Score

_BASELINES = {  # a metric that ends so belongs to the metric without it
    "untrained": "the same encoder before training",
    "pixels": "the image itself, made small",
    "color": "an image's colors alone, a caption being those of the training images that have it",
    "place": "the mean of what other images have at the place of a patch",
}


def evaluation_table(evaluation: Evaluation) -> str:
    """Return the table, which a reader can sort by any column; empty where there is no figure."""
    figures = [
        (task, metric, score, _beside(metric, metrics))
        for task, metrics in evaluation.items()
        for metric, score in metrics.items()
        if not metric.endswith(tuple(f"_{name}" for name in _BASELINES))
    ]
    if not figures:
        return ""
    columns = [name for name in _BASELINES if any(name in beside for *_, beside in figures)]
    heads = "".join(f'<th class="num sorts">{name}</th>' for name in ("value", "chance", *columns))
    rows = "".join(_row(*figure, columns) for figure in figures)
    told = "The mark in a bar is chance; a click on a column's name sorts by it."
    told += "".join(f" {name}: {_BASELINES[name]}." for name in columns)
    return (
        f"<p><small>{told}</small></p>"
        f'<div class="wide"><table><thead><tr><th class=sorts>task</th>{heads}<th class=bar></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _beside(metric: str, metrics: Mapping[str, Score]) -> dict[str, float]:
    """The baselines of a metric, by column."""
    return {name: metrics[f"{metric}_{name}"]["value"] for name in _BASELINES if f"{metric}_{name}" in metrics}


def _row(task: str, metric: str, score: Score, beside: Mapping[str, float], columns: list[str]) -> str:
    value, chance = score["value"], score["chance"]
    others = "".join(_cell(beside.get(name)) for name in columns)
    bar = f'<div><b style="width:{_percent(value)}"></b><i style="left:{_percent(chance)}"></i></div>'
    plain = metric.startswith(PLAIN)
    bar = "" if plain else bar
    return (
        f"<tr><td>{escape(task)}<br><small>{escape(metric)}</small></td>{_cell(value, bold=True, plain=plain)}"
        f"{_cell(chance, plain=plain)}"
        f"{others}<td class=bar>{bar}</td></tr>"
    )


def _cell(value: float | None, *, bold: bool = False, plain: bool = False) -> str:
    if value is None:
        return '<td class=num data-value=""></td>'
    shown = f"{value:.3f}" if plain else f"{100 * value:.1f}&#8239;%"
    return f'<td class=num data-value="{value!r}">{f"<b>{shown}</b>" if bold else shown}</td>'


def _percent(value: float) -> str:
    """Return a CSS width or position inside its box."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
