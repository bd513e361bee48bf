"""A node of a job's Ray cluster gives actors the GPUs that no rank has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("visible", "ranks", "given", "expected"),
    [
        ("0,1,2,3,4,5,6,7", 4, 4, "4,5,6,7"),
        ("GPU-a,GPU-b,GPU-c", 1, 1, "GPU-b"),
        ("0,1,2,3", 4, 2, "0,1,2,3"),  # there are none behind the ranks': they are shared
        ("0,1,2,3", 1, 4, "0,1,2,3"),
        ("0,1", 1, 0, "0,1"),
        ("", 4, 0, ""),
    ],
)
def test_actors_get_gpus_that_no_rank_has(tmp_path: Path, visible: str, ranks: int, given: int, expected: str) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "gpus $CUDA_VISIBLE_DEVICES"\necho "$@"\n')
    ray.chmod(0o755)
    settings = {"CUDA_VISIBLE_DEVICES": visible, "RAY_BEHIND_GPUS": str(ranks), "RAY_GPUS": str(given)}
    settings |= {"SLURMD_NODENAME": "localhost", "RAY_FILES": str(tmp_path), "RAY_PORT": "6379", "RAY_CPUS": "2"}
    settings |= {"RAY_STORE_BYTES": "100"}
    command = ["bash", str(LAUNCH / "ray_node.sh"), str(tmp_path / "python"), "head"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    told, options = done.stdout.splitlines()
    assert told == f"gpus {expected}" and f"--num-gpus={given} " in options
