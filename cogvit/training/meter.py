"""Where a step's numbers go: metrics.jsonl always, a progress bar or plain lines, and Weights & Biases if it is there.

Only the writing rank has sinks; on every other rank recording costs nothing.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

from cogvit.config import RunConfig, to_json
from cogvit.errors import ConfigError, DataError
from cogvit.training.folder import Folder


class Sink(Protocol):
    """Takes the numbers of each step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take one step."""

    def close(self) -> None:
        """Take no more."""


class Meter:
    """Records steps.

    Opening rewinds metrics.jsonl to start_step, the last step of the checkpoint that the run resumes from, so that the
    file has every step once; what it held of a start that saved nothing is kept beside it.
    A value that is not finite is left out: JSON cannot say it.
    """

    def __init__(self, out: Path, config: RunConfig, writer: bool, start_step: int) -> None:
        self._sinks: list[Sink] = []
        if not writer:
            return
        self._sinks.append(MetricsFile(out / "metrics.jsonl", start_step))
        steps = config.schedule.steps
        self._sinks.append(
            Bar(steps, start_step) if sys.stderr.isatty() else Lines(steps, start_step, config.log.every_steps)
        )
        if config.log.tensorboard:
            self._sinks.append(TensorBoard(out / "logs" / "tensorboard", start_step))
        if config.log.wandb != "off":
            self._sinks.append(WeightsAndBiases(out, config, start_step))

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers of one step."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for sink in self._sinks:
            sink.write(step, finite)

    def close(self) -> None:
        """Finish every sink; what was recorded is on disk already."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class MetricsLines:
    """What a metrics.jsonl holds; a last line that was cut off by a kill does not count."""

    steps: tuple[tuple[bytes, dict[str, float]], ...]  # lines with what they say
    damaged: tuple[bytes, ...]  # lines that say no step: a crash of the machine leaves such


def read_lines(path: Path) -> MetricsLines:
    """Sort the lines of a metrics.jsonl, in which a crash may have left anything. Errors: OSError."""
    steps, damaged = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _parsed(line)
        if row is not None and line.endswith(b"\n"):
            steps.append((line, row))
        elif line.endswith(b"\n") or b"\0" in line:
            damaged.append(line)
    return MetricsLines(tuple(steps), tuple(damaged))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the steps of a metrics.jsonl in order; a last line that was cut off by a kill does not count.

    Errors: DataError when the file is missing or a complete line says no step; the next start moves such lines aside.
    """
    try:
        lines = read_lines(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist; is {path.parent} a run directory?") from None
    for line in lines.damaged:
        if line.endswith(b"\n"):
            told = line.decode(errors="replace").strip()[:80]
            raise DataError(f"{path} has a line that is not JSON of a step: {told!r}; the next start moves it aside")
    return [row for _, row in lines.steps]


def _parsed(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_step = isinstance(row, dict) and type(row.get("step")) is int
    return row if is_step and all(isinstance(value, int | float) for value in row.values()) else None


def rewind(path: Path, start_step: int) -> None:
    """Leave the steps up to start_step in a metrics.jsonl, and nothing else.

    Those of a start that saved nothing move to metrics_before_N.jsonl, and damaged lines to metrics_damaged.jsonl.
    """
    lines = read_lines(path)
    if start_step == 0 and lines.steps:
        number = 1
        while (aside := path.with_name(f"metrics_before_{number}.jsonl")).exists():
            number += 1
        path.rename(aside)
        print(
            f"no checkpoint was saved before: begins at step 1; the metrics until now are in {aside}", file=sys.stderr
        )
        return
    if lines.damaged:
        aside = path.with_name("metrics_damaged.jsonl")
        print(f"{path}: {len(lines.damaged)} damaged lines were moved to {aside}", file=sys.stderr, flush=True)
        with aside.open("ab") as file:
            file.writelines(lines.damaged)
    kept = b"".join(line for line, row in lines.steps if row["step"] <= start_step)
    if path.read_bytes().startswith(kept):
        os.truncate(path, len(kept))  # in place: a full disk has no room for a copy
    else:
        Folder(str(path.parent)).write(path.name, kept)


class MetricsFile:
    """One JSON object a step, floats at full precision, each line handed to the system as it is written.

    A disk that is full is told once; training goes on, and the lines are written when there is room again.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rewind(path, start_step)
        self._file = path.open("ab", buffering=0)
        self._waiting, self._told = b"", False

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            while self._waiting:  # a disk that fills up takes a part of a line
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._told = False
        except OSError as error:
            if not self._told:
                print(f"{self._file.name} waits: {error.strerror}; training goes on", file=sys.stderr, flush=True)
            self._told = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def summary(values: dict[str, float]) -> str:
    """Return a step in a few words: losses, rate of learning, speed."""
    losses = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith(("loss", "eval_loss"))]
    formats = {
        "reward": "reward {:.3f}",
        "equal_groups": "equal {:.0%}",
        "lr": "lr {:.1e}",
        "grad_norm": "grad {:.3g}",
        "images_per_s": "{:.1f} img/s",
        "tokens_per_s": "{:.0f} tok/s",
    }
    return " ".join(losses + [text.format(values[name]) for name, text in formats.items() if name in values])


def duration(seconds: float) -> str:
    """Return a time span as 1h02m, 3m07s or 12s."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{rest_minutes:02d}m"
    return f"{minutes}m{rest_s:02d}s" if minutes else f"{rest_s}s"


class Bar:
    """A progress bar on the terminal."""

    def __init__(self, steps: int, start_step: int) -> None:
        self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Move the bar."""
        self._bar.set_postfix_str(summary(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Lines:
    """Plain lines, for logs: every few steps and at the end, with the time left at the pace of the last steps."""

    def __init__(self, steps: int, start_step: int, every_steps: int) -> None:
        self._steps = steps
        self._every_steps = every_steps
        self._seen: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=21)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Print a line if one is due."""
        self._seen.append((step, time.monotonic()))
        if step % self._every_steps and step != self._steps:
            return
        (first_step, first_s), (last_step, last_s) = self._seen[0], self._seen[-1]
        left_s = (self._steps - step) * (last_s - first_s) / max(1, last_step - first_step)
        print(f"step {step}/{self._steps} {summary(values)} left {duration(left_s)}", flush=True)

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files for TensorBoard; a resumed run goes on behind the step that it resumes from.

    Errors: ConfigError when tensorboard is not installed.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--log.tensorboard needs tensorboard; pip install tensorboard, or leave it out") from None
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """Logs online when the user is logged in, to files of the run directory otherwise; its failures are told, once.

    WANDB_MODE, if set, decides instead.
    """

    def __init__(self, out: Path, config: RunConfig, start_step: int) -> None:
        try:
            import wandb

            decided = "WANDB_MODE" in os.environ
            self._run = wandb.init(
                project="cogvit",
                name=out.name,
                id=_run_id(out / "logs" / "wandb_id", start_step),
                resume="allow",
                dir=out / "logs",
                config=to_json(config),
                mode=None if decided else "online" if wandb.login(prompt=False, verify=False) else "offline",
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )
        except Exception as error:  # whatever a logging service does, training goes on
            self._give_up(error)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"W&B stopped ({reason}); metrics.jsonl goes on", file=sys.stderr, flush=True)


def _run_id(path: Path, start_step: int) -> str:
    """Return the W&B id of this run directory; a run from step 0 gets a new one."""
    known = path.read_text() if start_step > 0 and path.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        Folder(str(path.parent)).write(path.name, known.encode())
    return known
