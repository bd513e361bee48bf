"""Where a run's wall time goes, over all its starts: what a fault costs is known to the start after it."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cogvit.training.folder import Folder
from cogvit.training.meter import read_lines

_FILE = "chrono.json"  # in RUN/logs: the losses known to the last start, in case it ends before its first save
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chrono:
    """Seconds by use, over all starts; stored with every checkpoint."""

    step_s: float = 0.0  # in steps that count, waiting for data left out
    data_wait_s: float = 0.0  # of those steps
    checkpoint_s: float = 0.0  # that saves took from training
    evaluation_s: float = 0.0
    lost_s: float = 0.0  # in steps that were done again because no checkpoint had them
    restart_s: float = 0.0  # from the last step of one start, or the launch, to the first step of the next

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that count; 1 before the first."""
        total_s = sum(asdict(self).values())
        return self.step_s / total_s if total_s else 1.0

    def plus(self, other: Chrono) -> Chrono:
        """Add field by field."""
        return Chrono(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


def after_restart(chrono: Chrono, out: Path, step: int, since_launch_s: float) -> Chrono:
    """Return a checkpoint's times with what the end of the start before this one cost.

    Call it on the writer, before metrics.jsonl is rewound to `step`, the checkpoint's. The time between two starts is
    measured on the clock of the file system's last write and ours; where they disagree it counts as no less than
    since_launch_s. The times are for the report alone: a file of them that is damaged, or that a full disk does not
    take, costs what it held.
    """
    metrics, logs = out / "metrics.jsonl", Folder(str(out / "logs"))
    known = _known(logs)
    lost_s, pause_s = 0.0, since_launch_s
    if metrics.exists():
        lost_s = sum(row.get("seconds", 0.0) for _, row in read_lines(metrics).steps if row["step"] > step)
        pause_s = max(pause_s, time.time() - metrics.stat().st_mtime)
    chrono = replace(
        chrono,
        lost_s=max(chrono.lost_s, known.lost_s) + lost_s,
        restart_s=max(chrono.restart_s, known.restart_s) + pause_s,
    )
    try:
        logs.write(_FILE, json.dumps({"lost_s": chrono.lost_s, "restart_s": chrono.restart_s}).encode())
    except OSError as error:
        _log.warning("%s/%s could not be written (%s); goodput may come out too high", logs, _FILE, error.strerror)
    return chrono


def _known(logs: Folder) -> Chrono:
    try:
        known = json.loads(logs.read(_FILE))
        return Chrono(lost_s=float(known["lost_s"]), restart_s=float(known["restart_s"]))
    except FileNotFoundError:
        return Chrono()
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s/%s cannot be read (%s); goodput may come out too high", logs, _FILE, error)
        return Chrono()
