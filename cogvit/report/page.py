"""The page of a report: one HTML file that opens without a network."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

import torch

from cogvit.config import RunConfig, load_config, to_json
from cogvit.errors import ConfigError
from cogvit.evaluation.examples import Example, Item
from cogvit.evaluation.results import Evaluation
from cogvit.report.chart import Series, line_chart, number
from cogvit.stages import stage_of
from cogvit.training.checkpoint import folder_of, list_checkpoints, read_state
from cogvit.training.chrono import Chrono
from cogvit.training.meter import duration, read_metrics

PACKAGES = ("cogvit", "torch", "megatron-core", "deepspeed", "ray", "transformers", "webdataset", "numpy", "wandb")


@dataclass(frozen=True)
class Run:
    """What a run directory says about a run."""

    name: str
    config: RunConfig
    rows: Sequence[Mapping[str, float]]  # of metrics.jsonl
    chrono: Chrono | None  # of the newest checkpoint

    def series(self, name: str, *, noisy: bool = True) -> Series:
        """Return one metric over the steps that have it."""
        steps = [row["step"] for row in self.rows if name in row]
        return Series(name, steps, [row[name] for row in self.rows if name in row], noisy)

    def names(self, prefix: str) -> list[str]:
        """Return the metrics with this prefix, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))


def write_report(
    out: Path,
    runs: Sequence[Path],
    evaluation: Evaluation,
    pictures: Mapping[str, bytes],
    examples: Sequence[Example] = (),
) -> None:
    """Write the report of run directories to the file `out`.

    evaluation: {task: {metric: {"value": v, "chance": c}}}; pictures: caption -> PNG. Each may be empty.
    Errors: ConfigError or DataError when a run directory has no config.json or metrics.jsonl.
    """
    loaded = [_load(path) for path in runs]
    body = [
        _header(loaded),
        _section("Evaluation", _evaluation_table(evaluation)),
        _section("Pictures", "".join(_picture(caption, png) for caption, png in pictures.items())),
        _section("Retrieval on held-out images", "".join(_example(example) for example in examples)),
        *(_section(stage_of(run.config).title, _run(run)) for run in loaded),
        _section("Software and machine", _table(_environment())),
    ]
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{_HEAD}\n</head>\n<body>\n{"".join(body)}</body>\n</html>\n'
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None


def _load(path: Path) -> Run:
    checkpoints = list_checkpoints(folder_of(path))
    chrono = read_state(checkpoints[-1]).chrono if checkpoints else None
    return Run(path.name, load_config(path / "config.json"), read_metrics(path / "metrics.jsonl"), chrono)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _header(runs: Sequence[Run]) -> str:
    names = " &rarr; ".join(escape(run.name) for run in runs)
    return f"<header>\n<h1>CogViT training report</h1>\n<p>{names}</p>\n</header>\n"


def _evaluation_table(evaluation: Evaluation) -> str:
    """One row a metric: its value as number and bar, with a mark at the chance level."""
    rows = []
    for task, metrics in evaluation.items():
        for metric, result in metrics.items():
            value, chance = result["value"], result["chance"]
            times = f"{value / chance:.1f}&times;" if chance > 0 else ""
            rows.append(
                f"<tr><td>{escape(task)}<br><small>{escape(metric)}</small></td>"
                f"<td class=num><b>{_share(value)}</b></td>"
                f"<td class=num>{_share(chance)}</td><td class=num>{times}</td>"
                f"<td class=bar><div><b style='width:{_percent(value)}'></b>"
                f"<i style='left:{_percent(chance)}'></i></div></td></tr>"
            )
    if not rows:
        return ""
    head = (
        "<tr><th>task</th><th class=num>value</th><th class=num>chance</th>"
        "<th class=num>ratio</th><th class=bar>value, with a mark at chance</th></tr>"
    )
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _share(value: float) -> str:
    return f"{100 * value:.1f}&#8239;%"


def _percent(value: float) -> str:
    """Return a CSS width or position inside its box."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"


def _picture(caption: str, png: bytes) -> str:
    return f"<figure>{_image(caption, png)}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(alt: str, png: bytes) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _example(example: Example) -> str:
    """A query and a row of answers; the right one is framed."""
    answers = "".join(f"<li{' class=right' if item.right else ''}>{_item(item)}</li>" for item in example.answers)
    return f'<div class="example"><div>{_item(example.query)}</div><ol>{answers}</ol></div>'


def _item(item: Item) -> str:
    image = "" if item.png is None else _image(item.caption, item.png)
    return f"{image}<span>{escape(item.caption)}</span>"


def _run(run: Run) -> str:
    if not run.rows:
        return "<p>No step was recorded.</p>"
    charts = [
        line_chart("Loss", [run.series(name) for name in run.names("loss")]),
        line_chart("Held-out loss", [run.series(name, noisy=False) for name in run.names("eval_loss")]),
        line_chart("Learning rate", [run.series("lr", noisy=False)]),
        line_chart("Gradient norm", [run.series(name) for name in run.names("grad_norm")]),
        line_chart("Images per second", [run.series("images_per_s")]),
        line_chart("Tokens per second", [run.series("tokens_per_s")]),
    ]
    settings = json.dumps(to_json(run.config), indent=2, ensure_ascii=False)
    return (
        f'<div class="cards">{"".join(_cards(run))}</div><div class="charts">{"".join(charts)}</div>'
        f"{_goodput(run.chrono)}"
        f"<h3>Settings that differ from the defaults</h3>{_table(_changed(to_json(run.config), to_json(RunConfig())))}"
        f"<details><summary>Complete configuration</summary><pre>{escape(settings)}</pre></details>"
    )


def _cards(run: Run) -> list[str]:
    """Return the run's key figures; rates are medians, so that the first steps do not count."""
    last = run.rows[-max(1, len(run.rows) // 20) :]
    totals = {name: sum(row.get(name, 0.0) for row in run.rows) for name in ("images", "tokens", "seconds")}
    rates = {name: median(row.get(name, 0.0) for row in run.rows) for name in ("images_per_s", "tokens_per_s")}
    figures = {
        "steps": f"{run.rows[-1]['step']:.0f}",
        "final loss": number(mean(row["loss"] for row in last)),
        "images": number(totals["images"]),
        "tokens": number(totals["tokens"]),
        "images/s": number(rates["images_per_s"]),
        "tokens/s": number(rates["tokens_per_s"]),
        "time in steps": duration(totals["seconds"]),
    }
    return [f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures.items()]


def _goodput(chrono: Chrono | None) -> str:
    """Say where the wall time went, over all starts."""
    if chrono is None:
        return ""
    uses = {
        "steps that count": chrono.step_s,
        "waiting for data": chrono.data_wait_s,
        "saving checkpoints": chrono.checkpoint_s,
        "evaluation": chrono.evaluation_s,
        "steps done again after a fault": chrono.lost_s,
        "starts and restarts": chrono.restart_s,
    }
    total_s = sum(uses.values()) or 1.0
    rows = {use: f"{seconds:,.1f} s ({seconds / total_s:.1%})" for use, seconds in uses.items()}
    return f"<h3>Wall time: goodput {chrono.goodput:.1%}</h3>{_table(rows)}"


def _changed(values: Mapping[str, object], defaults: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return the leaves that differ from the defaults, by dotted path."""
    changed: dict[str, str] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            changed |= _changed(value, default, f"{prefix}{name}.")
        elif value != default:
            changed[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return changed


def _environment() -> dict[str, str]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "accelerators": ", ".join(devices) or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(rows: Mapping[str, str]) -> str:
    if not rows:
        return "<p>None.</p>"
    lines = (f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f'<div class="wide"><table class="pairs">{"".join(lines)}</table></div>'


_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CogViT training report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1d1f; --quiet: #686b70; --rule: #e4e4e1; --accent: #2a6fdb;
  --series-1: #2a6fdb; --series-2: #d9622b; --series-3: #17936a; --series-4: #8a55c8; --series-5: #b8860b;
  --series-6: #c23b6b;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1b1d20; --ink: #ececea; --quiet: #9a9da3; --rule: #303338; --accent: #6ea4ff;
  --series-1: #6ea4ff; --series-2: #f08a55; --series-3: #45c496; --series-4: #b58cf0; --series-5: #dcb04a;
  --series-6: #ee7fa4;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 0 0 1rem; }
h3 { font-size: 0.95rem; margin: 2rem 0 0.5rem; }
header p { color: var(--quiet); margin: 0.4rem 0 0; }
section { margin-top: 3rem; }
figure { margin: 0 0 1.5rem; }
figcaption { color: var(--quiet); font-size: 0.875rem; margin-top: 0.4rem; }
img { display: block; width: 100%; border-radius: 8px; background: #fff; }
.cards { display: flex; flex-wrap: wrap; gap: 1px; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.cards div { flex: 1 1 6.5rem; background: var(--card); padding: 0.8rem 0.9rem; }
.cards b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.cards span { color: var(--quiet); font-size: 0.8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 0.9rem 0.9rem 0.4rem;
  margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
.chart figcaption { margin: 0 0 0.5rem; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; }
.chart figcaption > b { color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; }
.legend i { display: inline-block; width: 0.8em; height: 0.2em; border-radius: 1px; margin-right: 0.4em;
  vertical-align: 0.25em; }
.legend em { font-style: normal; color: var(--ink); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.grid { stroke: var(--rule); stroke-width: 1; }
.raw { stroke-width: 1; opacity: 0.3; }
.line { stroke-width: 2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.45rem 0.9rem 0.45rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pairs td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; width: 100%; }
small { color: var(--quiet); }
.bar { width: 46%; padding-right: 0; }
.bar div { position: relative; height: 0.55rem; margin-top: 0.45rem; background: var(--rule); border-radius: 3px; }
.bar b { display: block; height: 100%; background: var(--accent); border-radius: 3px; }
.bar i { position: absolute; top: -0.2rem; bottom: -0.2rem; width: 2px; background: var(--ink); }
@media (max-width: 40rem) { .bar { display: none; } th, td { padding-right: 0.6rem; } }
.example { display: flex; gap: 1rem; padding: 0.7rem 0; border-bottom: 1px solid var(--rule); }
.example > div { flex: 0 0 9rem; font-weight: 600; }
.example ol { flex: 1; display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 0.5rem; margin: 0;
  padding: 0; list-style: none; }
.example li { padding: 0.3rem; border: 2px solid transparent; border-radius: 8px; }
.example .right { border-color: var(--series-3); }
.example img { width: 4rem; height: 4rem; object-fit: contain; image-rendering: pixelated; margin-bottom: 0.3rem; }
.example span { display: block; font-size: 0.8rem; line-height: 1.3; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .example { flex-direction: column; } .example > div { flex-basis: auto; } }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--quiet); font-size: 0.9rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; overflow-x: auto;
  font: 0.8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
</style>"""
