"""A container's 64 MB of /dev/shm: Ray falls back to its directory, and teachers are served."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, shutil
assert shutil.disk_usage("/dev/shm").total <= 64 * 2**20
from cogvit.teacher.actors import connect, plan_cluster
with connect(plan_cluster(""), 1):
    import ray
    data = os.urandom(100 * 2**20)  # more than /dev/shm holds
    assert ray.get(ray.put(data)) == data
print("served")
"""


@pytest.mark.timeout(300)
def test_ray_serves_where_shared_memory_is_small() -> None:
    """ray#14616, ray#33525."""
    inside = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"this needs a /dev/shm of its own, and that is not allowed: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "served"
