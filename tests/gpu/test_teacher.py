"""Teachers on the GPU: the CPU's features, on images of several grids, and features that leave on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cogvit.config import SUMMARY
from cogvit.teacher.zoo import load_teacher
from tests import teachers

GRIDS = [(3, 3), (2, 5), (3, 3)]


@pytest.mark.parametrize("name", ["siglip2", "dinov3", "own"])
def test_a_teacher_says_what_it_says_on_the_cpu(tmp_path: Path, device: torch.device, name: str) -> None:
    path = (teachers.write_teachers(tmp_path) | {"own": "tests.teachers:own"})[name]
    here = load_teacher(path, "fp32", parts=("", SUMMARY))
    there = load_teacher(path, "fp32", parts=("", SUMMARY), device=device)
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*here.input_px(grid), 3), dtype=np.uint8) for grid in GRIDS]
    for mine, other in zip(here.features(images, GRIDS), there.features(images, GRIDS), strict=True):
        assert other.device.type == "cpu"
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-4)
