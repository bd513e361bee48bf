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
from cogvit.report.figures import evaluation_table
from cogvit.report.font import font_face
from cogvit.report.style import HEAD
from cogvit.stages import settings_of, stage_of
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
    examples: Mapping[str, Sequence[Example]] | None = None,
) -> None:
    """Write the page of run directories to the file `out`; the arguments and errors are those of `report_page`."""
    page = report_page(runs, evaluation, pictures, examples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None


def report_page(
    runs: Sequence[Path],
    evaluation: Evaluation,
    pictures: Mapping[str, bytes],
    examples: Mapping[str, Sequence[Example]] | None = None,
    *,
    refresh_s: int = 0,
) -> str:
    """Return the page: first how good the encoder is beside its baselines, then what it sees, then how it was trained.

    evaluation: {task: {metric: {"value": v, "chance": c}}}; pictures: caption -> PNG; examples by
    the title of their section. Each may be empty.
    refresh_s: the page loads itself anew after so many seconds; 0 never.
    Errors: ConfigError or DataError when a run directory has no config.json or metrics.jsonl.
    """
    loaded = [_load(path) for path in runs]
    body = [
        _header(loaded),
        _section("Evaluation", evaluation_table(evaluation)),
        _section("Pictures", "".join(_picture(caption, png) for caption, png in pictures.items())),
        *(_section(title, "".join(_example(one) for one in shown)) for title, shown in (examples or {}).items()),
        *(_section(stage_of(run.config).title, _run(run)) for run in loaded),
        _section("Software and machine", _table(_environment())),
    ]
    again = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    face = font_face("".join(body))
    head = f"{HEAD}\n{again}{f'<style>{face}</style>' if face else ''}"
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n{"".join(body)}</body>\n</html>\n'


def _load(path: Path) -> Run:
    checkpoints = list_checkpoints(folder_of(path))
    chrono = read_state(checkpoints[-1]).chrono if checkpoints else None
    return Run(path.name, load_config(path / "config.json"), read_metrics(path / "metrics.jsonl"), chrono)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _header(runs: Sequence[Run]) -> str:
    names = " &rarr; ".join(escape(run.name) for run in runs)
    return f"<header>\n<h1>CogViT training report</h1>\n<p>{names}</p>\n</header>\n"


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
        line_chart("What images are worth", [run.series(name, noisy=False) for name in run.names("image_effect")]),
        *_rollout_charts(run),
        line_chart("Learning rate", [run.series("lr", noisy=False)]),
        line_chart("Gradient norm", [line for line in map(run.series, run.names("grad_norm")) if any(line.y)]),
        line_chart("Images per second", [run.series("images_per_s")]),
        line_chart("Tokens per second", [run.series("tokens_per_s")]),
    ]
    settings = json.dumps(settings_of(run.config), indent=2, ensure_ascii=False)
    return (
        f'<div class="cards">{"".join(_cards(run))}</div><div class="charts">{"".join(charts)}</div>'
        f"{_goodput(run.chrono)}"
        f"<h3>Settings that differ from the defaults</h3>{_table(_changed(to_json(run.config), to_json(RunConfig())))}"
        f"<details><summary>Complete configuration</summary><pre>{escape(settings)}</pre></details>"
    )


def _rollout_charts(run: Run) -> list[str]:
    """What a policy's answers were like; nothing of a run that gave none."""
    lost = ("aborted_prompts", "failed_prompts", "stale_prompts")
    return [
        line_chart("Reward", [run.series(name) for name in run.names("reward")]),
        line_chart("Prompts with a right answer (pass@k)", [run.series(name) for name in run.names("pass_")]),
        line_chart("Prompts whose answers are all worth the same", [run.series(one) for one in run.names("equal_")]),
        line_chart("Staleness, steps", [run.series(name) for name in run.names("staleness")]),
        line_chart("Length of answers, tokens", [run.series(name) for name in run.names("answer_length")]),
        line_chart("Prompts put off, failed or stale", [run.series(name) for name in lost if run.names(name)]),
        line_chart("Answers per second", [run.series(name) for name in run.names("answers_per_s")]),
        line_chart("Rollout against training, nats", [run.series(name) for name in run.names("logprob_gap")]),
    ]


def _cards(run: Run) -> list[str]:
    """Return the run's key figures; rates are medians, so that the first steps do not count."""
    last = run.rows[-max(1, len(run.rows) // 20) :]
    totals = {name: sum(row.get(name, 0.0) for row in run.rows) for name in ("images", "tokens", "seconds")}
    rates = {name: median(row.get(name, 0.0) for row in run.rows) for name in ("images_per_s", "tokens_per_s")}
    # The loss of a policy is about 0 however good it is.
    kind = "reward" if any("reward" in row for row in last) else "loss"
    final = {f"final {kind}": number(mean(row[kind] for row in last if kind in row))}
    figures = {
        "steps": f"{run.rows[-1]['step']:.0f}",
        **final,
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
