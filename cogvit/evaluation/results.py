"""The figures of an evaluation: as data, as a table and as a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cogvit.errors import ConfigError

Score = dict[str, float]  # "value", and "chance": what guessing gives
Evaluation = dict[str, dict[str, Score]]  # task -> metric -> score
PLAIN = ("nats", "cider")  # metrics that are no shares


def score(value: float, chance: float) -> Score:
    """Return a figure with what guessing gives."""
    return {"value": value, "chance": chance}


def table(results: Evaluation) -> str:
    """Return one line a figure: task, metric, value and chance."""
    rows = [("task", "metric", "value", "chance")]
    for task, metrics in results.items():
        for metric, figure in metrics.items():
            form = ".3f" if metric.startswith(PLAIN) else ".1%"
            rows.append((task, metric, f"{figure['value']:{form}}", f"{figure['chance']:{form}}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(f"{t:<{widths[0]}}  {m:<{widths[1]}}  {v:>{widths[2]}}  {c:>{widths[3]}}" for t, m, v, c in rows)


def read_evaluation(path: Path) -> Evaluation:
    """Read the figures of a JSON file. Errors: ConfigError when it is missing or holds something else."""
    try:
        found = json.loads(path.read_text())
        return {
            task: {metric: score(float(figure["value"]), float(figure["chance"])) for metric, figure in metrics.items()}
            for task, metrics in found.items()
        }
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ConfigError(f"{path} does not hold an evaluation; choose another file") from None


def write_evaluation(path: Path, results: Evaluation) -> None:
    """Write the figures as JSON, all or nothing. Errors: ConfigError when the file cannot be written."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}") from None
