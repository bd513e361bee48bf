"""Ctrl-C at a run of two ranks: the terminal signals both, once or twice, and the run goes on with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cogvit.training.checkpoint import folder_of, latest, read_state
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_shards
from tests.faults.test_kills import FLAGS, SAVED_EVERY, STEPS, assert_same, train
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
Job = subprocess.Popen[bytes]


@contextmanager
def two_ranks(argv: list[str]) -> Iterator[Job]:
    """Start the trainer on two ranks as a terminal's foreground job: the script and its ranks are one process group."""
    command = ["launch/local.sh", "2", *argv]
    environment = os.environ | {"PYTHON": sys.executable}
    with subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0) as job:
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def wait_for_step(job: Job, run: Path, step: int) -> None:
    """Return when a step is in metrics.jsonl."""
    while not (run / "metrics.jsonl").exists() or last_recorded(run) < step:
        assert job.poll() is None
        time.sleep(0.02)


def last_recorded(run: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(run / "metrics.jsonl")), default=0)


def last_saved(run: Path) -> int:
    path = latest(folder_of(run))
    assert path is not None
    return read_state(path).step


@pytest.mark.timeout(600)
def test_ctrl_c_once_saves_and_twice_ends_at_once(pool: Pool, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", "numbers-00000", 48)
    argv = [*FLAGS, "--data.shards", str(tmp_path / "shards"), "--out"]
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    pool.run(train, 2, ([*argv, str(straight)], -1, 0.0), timeout_s=120)

    with two_ranks([*argv, str(disturbed)]) as job:
        wait_for_step(job, disturbed, 2)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=60) == 75
    stopped = last_saved(disturbed)
    assert stopped == last_recorded(disturbed) < 6

    # A disk that does not answer: the next checkpoint's note waits for a reader, and the save after it for the note.
    waits = stopped - stopped % SAVED_EVERY + SAVED_EVERY
    note = disturbed / "logs" / ".newest_checkpoint.partial"
    os.mkfifo(note)
    with two_ranks([*argv, str(disturbed)]) as job:
        wait_for_step(job, disturbed, waits + SAVED_EVERY)
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(2.5)
        assert job.poll() is None
        start_s = time.monotonic()
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=60) == 75
        assert time.monotonic() - start_s < 10
    note.unlink()
    assert last_saved(disturbed) == waits

    ended = pool.run(train, 2, ([*argv, str(disturbed)], -1, 0.0), timeout_s=120)
    assert [status for status, _ in ended] == [0, 0] and last_saved(disturbed) == STEPS
    assert_same(disturbed, straight)
