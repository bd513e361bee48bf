"""A torch module of the user's own as a teacher, by its import path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogvit.config import SUMMARY
from cogvit.errors import ConfigError
from cogvit.teacher.zoo import Grid, Pixels, fingerprint, inspect_teacher, load_teacher
from tests import teachers

GRIDS: tuple[Grid, ...] = ((3, 3), (2, 5), (4, 4), (2, 5))
OWN = "tests.teachers:own"


def images_of(grids: tuple[Grid, ...]) -> list[Pixels]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (rows * 4, columns * 4, 3), np.uint8) for rows, columns in grids]


def test_a_module_of_ones_own_sees_images_of_any_grid_between_minus_one_and_one() -> None:
    teacher = load_teacher(OWN, "fp32")
    assert (teacher.dim, teacher.input_px((2, 5))) == (12, (8, 20))
    images, model = images_of(GRIDS), teachers.own().model
    for image, grid, feature in zip(images, GRIDS, teacher.features(images, GRIDS), strict=True):
        expected = model(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1)[0]
        assert feature.shape == (grid[0] * grid[1], 12) and not feature.requires_grad
        torch.testing.assert_close(feature, expected, atol=1e-6, rtol=0)


def test_one_with_a_grid_and_a_normalization_of_its_own_is_resampled() -> None:
    teacher = load_teacher("tests.teachers:own_of_one_grid", "fp32")
    assert {teacher.input_px(grid) for grid in GRIDS} == {(16, 16)}
    (image,) = images_of(((4, 4),))
    own, other = teacher.features([image, image], ((4, 4), (2, 5)))
    expected = teachers.own().model(torch.tensor(image).permute(2, 0, 1)[None] / 255)[0]
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=0)
    field = F.interpolate(expected.T.reshape(1, 12, 4, 4), (2, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(other, field[0].flatten(1).T, atol=1e-6, rtol=0)


def test_its_summary_is_the_mean_of_its_patches() -> None:
    for feature in load_teacher(OWN, "fp32", parts=("", SUMMARY)).features(images_of(GRIDS), GRIDS):
        torch.testing.assert_close(feature[0], feature[1:].mean(dim=0))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_compiled_teacher_says_the_same() -> None:
    plain, compiled = (load_teacher(OWN, "fp32", compiled=on).features(images_of(GRIDS), GRIDS) for on in (False, True))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted >= 1
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_bf16_is_near_fp32() -> None:
    exact, rounded = (
        torch.cat(load_teacher(OWN, precision).features(images_of(GRIDS), GRIDS)) for precision in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded.float(), exact)
    assert F.cosine_similarity(exact, rounded.float()).min() > 0.999


MODULE = """
import torch
from cogvit import TeacherWrapper

class Patches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4, bias=False)
        torch.nn.init.constant_(self.conv.weight, {weight})

    def forward(self, images):
        return self.conv(images).flatten(2).transpose(1, 2)

def teacher():
    return TeacherWrapper(Patches(), 8, preprocess=lambda x: x * {scale}, patch_size=4)
"""


def fingerprint_of(path: Path, weight: float, scale: float) -> str:
    path.write_text(MODULE.format(weight=weight, scale=scale))
    importlib.invalidate_caches()
    sys.modules.pop(path.stem, None)
    return fingerprint(inspect_teacher(f"{path.stem}:teacher"))


def test_the_fingerprint_changes_with_weights_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions within a second would share a cached file
    path = tmp_path / "module_of_a_teacher.py"
    found = [fingerprint_of(path, weight, scale) for weight, scale in ((1, 2), (3, 2), (1, 4), (1, 2))]
    assert found[0] == found[3] and len(set(found)) == 3
    sys.modules.pop(path.stem)
    weights_alone = fingerprint(inspect_teacher(OWN))
    assert weights_alone != fingerprint(inspect_teacher("tests.teachers:own_of_one_grid"))
    assert weights_alone == fingerprint(inspect_teacher(OWN))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.no_such_module:own", "No module named 'tests.no_such_module'"),
        ("tests.teachers:no_such_function", "has no attribute 'no_such_function'"),
        ("tests.teachers:no_wrapper", "must return a cogvit.TeacherWrapper, not a Convolutions"),
        ("tests.teachers:failing", r"FileNotFoundError: weights.pt is gone \(.*teachers\.py:\d+\)"),
    ],
)
def test_what_is_no_teacher_is_refused_in_one_line(path: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        inspect_teacher(path)
    assert "\n" not in str(caught.value) and path in str(caught.value)


def test_one_has_no_layers_to_choose_from() -> None:
    with pytest.raises(ConfigError, match="gives one layer"):
        inspect_teacher(OWN, -2)


def test_one_that_gives_another_width_than_it_says_is_named() -> None:
    path = "tests.teachers:own_of_another_width"
    with pytest.raises(ConfigError, match=rf"teacher {path}: .*\(1, 16, 12\); expected \(1, 16, 10\)"):
        load_teacher(path, "fp32").features(images_of(((4, 4),)), ((4, 4),))
