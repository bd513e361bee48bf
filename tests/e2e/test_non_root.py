"""A user who is not root, has no home and owns one directory: stage 1 with Ray's teachers, and its refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.e2e.test_commands import SMALL

ROOT = Path(__file__).parents[2]
NOBODY = 65534
# Python may lie below a directory of root's own: others get a view of the machine in which that directory is open.
OPENED = 'mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 tmpfs "$2" && mkdir -p "$1" && mount --move /mnt "$1"'


@pytest.fixture
def world() -> Iterator[Path]:
    """Shards and teachers in a directory that the user owns; pytest's own are root's."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp", ignore_cleanup_errors=True) as directory:
        write_world(Path(directory))
        if os.geteuid() == 0:
            for path in [Path(directory), *Path(directory).rglob("*")]:
                os.chown(path, NOBODY, NOBODY)
        yield Path(directory)


def as_nobody(world: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without rights, with a small environment."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
        base = Path(sys.base_prefix)
        closed = [parent for parent in reversed(base.parents) if not parent.stat().st_mode & 0o001]
        if closed:
            inside = f'{OPENED} && shift 2 && exec "$@"'
            user = ["unshare", "--mount", "sh", "-c", inside, "sh", str(base), str(closed[0]), *user]
        command = tuple(user)
    done = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True, timeout=280)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this needs a view of the machine of its own, and that is not allowed: {done.stderr.strip()}")
    return done


@pytest.mark.timeout(600)
def test_a_user_without_rights_trains_with_teachers(world: Path) -> None:
    paths = [f"--teachers.members.{name}.path={world / 'teachers' / name}" for name in ("siglip2", "dinov3")]
    train = [sys.executable, "-m", "cogvit.train", "demo_stage1", *paths, *SMALL, "--data.shards", "shards"]
    train += ["--log.wandb", "auto", "--schedule.steps", "2"]
    done = as_nobody(world, *train, "--out", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_metrics(world / "run" / "metrics.jsonl")] == [1, 2]
    assert list((world / "run").glob("logs/wandb/offline-run-*"))
    written = {path.stat().st_uid for path in (world / "run").rglob("*")}
    assert written == {NOBODY if os.geteuid() == 0 else os.geteuid()}
    (world / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root's, and open to no one
        (world / "closed").chmod(0o700)
    refused = as_nobody(world, *train, "--out", "closed/run")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr[-2000:]
    assert "closed" in [line for line in refused.stderr.splitlines() if line.startswith("error: ")][-1]
