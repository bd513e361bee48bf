"""What a start on a corpus costs: `python -m tools.bench._start PATTERN [PROCESSES]` prints figures as JSON."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from data_pipeline.index import load_index
from data_pipeline.plan import Planner
from tools.bench._memory import held_mb
from tools.bench.scale import spec_of_runs

SHARE = 5  # of 64, whose batches are asked for


def start(pattern: str) -> dict[str, Any]:
    """Open a corpus and plan a few steps of a share."""
    before_mb, times = held_mb(), [time.process_time()]
    index = load_index(pattern)
    times.append(time.process_time())
    opened_mb = held_mb() - before_mb
    planner = Planner(index, spec_of_runs(), seed=1)
    times.append(time.process_time())
    for step in (0, 1, 16):
        planner.batch(step, [SHARE])
        times.append(time.process_time())
    open_s, planner_s, batch_s, step_s, window_s = (after - at for at, after in pairwise(times))
    return {
        "before_mb": before_mb,
        "open_ms": 1e3 * open_s,
        "planner_ms": 1e3 * planner_s,
        "batch_s": batch_s,
        "step_ms": 1e3 * step_s,
        "window_ms": 1e3 * window_s,
        "opened_mb": opened_mb,
        "planned_mb": held_mb() - before_mb,
    }


def _share_memory(pattern: str, started: Barrier, measured: Barrier, found: Any) -> None:
    """Open a corpus and tell what of its pages is this process's part, while the others have it open too."""
    index = load_index(pattern)
    for shard in range(min(index.corpus.num_shards, 64)):
        index.corpus.check_shards([shard])
    started.wait()
    lines = Path("/proc/self/smaps").read_text().split(".cogvit\n")[1:]
    found.put(sum(int(line.split()[1]) for part in lines for line in part.splitlines()[1:8] if line.startswith("Pss:")))
    measured.wait()


def pss_kb(pattern: str, processes: int) -> int:
    """Return the proportional set size of a corpus in some processes together."""
    context = multiprocessing.get_context("spawn")
    started, measured, found = context.Barrier(processes), context.Barrier(processes), context.Queue()
    arguments = (pattern, started, measured, found)
    running = [context.Process(target=_share_memory, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    total = sum(found.get() for _ in running)
    for process in running:
        process.join()
    return total


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps({"pss_over_one": pss_kb(sys.argv[1], int(sys.argv[2])) / pss_kb(sys.argv[1], 1)}))
    else:
        print(json.dumps(start(sys.argv[1])))
