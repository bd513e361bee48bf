"""A cluster of Ray of our own: its second try, who may join it, and what kill -9 of its run leaves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cogvit.teacher.actors import connect, plan_cluster
from cogvit.teacher.scratch import scratch
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
HOLD = """
import os, time
from cogvit.teacher.actors import connect, plan_cluster
with connect(plan_cluster(""), 1) as cluster:
    print(cluster.address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    time.sleep(600)
"""
JOIN = """
import sys
from cogvit.teacher.actors import connect, plan_cluster
with connect(plan_cluster(sys.argv[1]), 0):
    import ray
    print(len(ray.nodes()))
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory for the files of this test's Rays alone."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        yield Path(directory)


def processes_of(directory: Path, name: str = "") -> list[int]:
    """The processes with a directory on their command line, by what they run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if os.fsencode(directory) in command and command.split(b"\0")[0].endswith(name.encode()):
                found.append(int(path.name))
    return found


def start_with_a_kill(rank: int, world: int, base: Path) -> tuple[list[str], list[str], int]:
    """Connect while the first GCS is killed; returns what was said, the directories, and processes of the first try."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cogvit.teacher.actors").addHandler(handler)
    os.environ["RAY_TMPDIR"] = str(base)

    def kill() -> None:
        while not (found := processes_of(base, "gcs_server")):
            time.sleep(0.005)
        os.kill(found[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with connect(plan_cluster(""), 1):
        directories = [str(path) for path in base.glob("cogvit-ray-*")]
        left = set(processes_of(base)) - set(processes_of(Path(directories[0])))
        return said, directories, len(left)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ray_is_tried_twice_and_the_first_try_leaves_nothing(pool: Pool, base: Path) -> None:
    """ray#62883: on a slow machine Ray's own 30 s are over before it is up."""
    ((said, directories, left),) = pool.run(start_with_a_kill, 1, (base,), timeout_s=280.0)
    assert len(said) == 1 and said[0].startswith("Ray did not start (") and said[0].endswith("; once more")
    assert len(directories) == 1 and left == 0
    assert not list(base.glob("cogvit-ray-*"))


@pytest.mark.timeout(300)
def test_a_cluster_asks_for_its_token_and_ends_with_its_run(base: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    clean |= {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", HOLD], env=clean, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        address, token = run.stdout.readline().split()
        (directory,) = base.glob("cogvit-ray-*")
        joined = {}
        for name, more in (
            ("none", {}),
            ("wrong", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}),
            ("right", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}),
        ):
            command = [sys.executable, "-c", JOIN, address]
            joined[name] = subprocess.run(command, env=clean | more, capture_output=True, text=True, timeout=100)
        with scratch() as mine:  # another start leaves the files of one that lives
            assert directory.exists() and Path(mine) != directory
    finally:
        run.kill()
        run.wait()
    assert {name: done.returncode == 0 for name, done in joined.items()} == {
        "none": False,
        "wrong": False,
        "right": True,
    }, joined
    deadline_s = time.monotonic() + 60
    while left := processes_of(directory):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)
    assert directory.exists()
    with scratch():
        assert not directory.exists()
