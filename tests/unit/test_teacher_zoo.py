from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cogvit.config import SUMMARY
from cogvit.errors import ConfigError
from cogvit.teacher.zoo import Grid, fingerprint, inspect_teacher, load_teacher
from tests import teachers

GRIDS: tuple[Grid, ...] = ((3, 3), (2, 5), (4, 1), (2, 5))  # square and not, with a pair of one grid


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    for build in (teachers.siglip2, teachers.dinov3, teachers.siglip, teachers.siglip2_with_text):
        build().save_pretrained(path / build.__name__)
    return path


def images_of(grids: tuple[Grid, ...], patch_size_px: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (rows * patch_size_px, columns * patch_size_px, 3), np.uint8) for rows, columns in grids
    ]


def test_siglip2_is_the_transformers_model_on_any_grid(directory: Path) -> None:
    teacher = load_teacher(str(directory / "siglip2"), "fp32")
    images = images_of(GRIDS, 4)
    features = teacher.features(images, GRIDS)
    direct = teachers.transformers.Siglip2VisionModel.from_pretrained(directory / "siglip2").eval()
    for image, grid, feature in zip(images, GRIDS, features, strict=True):
        # As transformers' own image processor lays patches out: rows of patches, channels last inside a patch.
        patches = [
            image[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].reshape(-1)
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        pixels = torch.tensor(np.stack(patches))[None] / 127.5 - 1
        expected = direct(
            pixel_values=pixels,
            pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int64),
            spatial_shapes=torch.tensor([grid]),
        ).last_hidden_state[0]
        assert feature.shape == (grid[0] * grid[1], 32)
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)


def test_dinov3_is_the_transformers_model_without_class_and_register_tokens(directory: Path) -> None:
    teacher = load_teacher(str(directory / "dinov3"), "fp32")
    images = images_of(GRIDS, 8)
    features = teacher.features(images, GRIDS)
    direct = teachers.transformers.DINOv3ViTModel.from_pretrained(directory / "dinov3").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, feature in zip(images, features, strict=True):
        pixels = ((torch.tensor(image) / 255 - mean) / std).permute(2, 0, 1)[None]
        expected = direct(pixel_values=pixels).last_hidden_state[0, 1 + 3 :]
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["siglip2", "siglip"])
def test_siglips_summary_is_its_pooled_output(directory: Path, name: str) -> None:
    grids: tuple[Grid, ...] = ((4, 4), (4, 4)) if name == "siglip" else GRIDS
    images = images_of(grids, 4)
    plain = load_teacher(str(directory / name), "fp32").features(images, grids)
    both = load_teacher(str(directory / name), "fp32", parts=("", SUMMARY)).features(images, grids)
    for feature, rows in zip(plain, both, strict=True):
        assert torch.equal(rows[1:], feature)
    model = getattr(teachers.transformers, "Siglip2VisionModel" if name == "siglip2" else "SiglipVisionModel")
    direct = model.from_pretrained(directory / name).eval()
    image, (rows, columns) = torch.tensor(images[0]) / 127.5 - 1, grids[0]
    if name == "siglip":
        expected = direct(pixel_values=image.permute(2, 0, 1)[None]).pooler_output[0]
    else:
        patches = image.reshape(rows, 4, columns, 4, 3).transpose(1, 2).reshape(1, rows * columns, -1)
        mask = torch.ones(1, rows * columns, dtype=torch.int64)
        shapes = torch.tensor([grids[0]])
        expected = direct(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output[0]
    torch.testing.assert_close(both[0][0], expected, atol=1e-5, rtol=0)


def test_dinov3s_summary_is_its_class_token(directory: Path) -> None:
    images = images_of(GRIDS, 8)
    found = load_teacher(str(directory / "dinov3"), "fp32", parts=("", SUMMARY)).features(images, GRIDS)
    plain = load_teacher(str(directory / "dinov3"), "fp32").features(images, GRIDS)
    direct = teachers.transformers.DINOv3ViTModel.from_pretrained(directory / "dinov3").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, rows, feature in zip(images, found, plain, strict=True):
        pixels = ((torch.tensor(image) / 255 - mean) / std).permute(2, 0, 1)[None]
        expected = direct(pixel_values=pixels).last_hidden_state[0, 0]
        torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=0)
        assert torch.equal(rows[1:], feature)


def test_a_lower_layer_goes_through_the_last_norm_and_is_another_teacher(directory: Path) -> None:
    path, grid = str(directory / "dinov3"), (3, 3)
    (image,) = images_of((grid,), 8)
    (feature,) = load_teacher(path, "fp32", layer=-2).features([image], [grid])
    direct = teachers.transformers.DINOv3ViTModel.from_pretrained(path).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.tensor(image) / 255 - mean) / std).permute(2, 0, 1)[None]
    hidden = direct(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(feature, direct.norm(hidden)[0, 1 + 3 :], atol=1e-5, rtol=0)
    assert fingerprint(inspect_teacher(path, -2)) != fingerprint(inspect_teacher(path))
    with pytest.raises(ConfigError, match="has 2 blocks; its layer=-3 must be -2 to -1"):
        inspect_teacher(path, -3)


def test_siglip_sees_its_own_square_and_is_resampled(directory: Path) -> None:
    teacher = load_teacher(str(directory / "siglip"), "fp32")
    grids = ((4, 4), (2, 2), (3, 5))
    assert {teacher.input_px(grid) for grid in grids} == {(16, 16)}
    images = images_of(((4, 4),) * 3, 4)
    own, half, other = teacher.features(images, grids)
    direct = teachers.transformers.SiglipVisionModel.from_pretrained(directory / "siglip").eval()
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = direct(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(own, expected[0], atol=1e-5, rtol=0)
    field = expected[1].T.reshape(1, 32, 4, 4)
    resampled = F.interpolate(field, (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(half, resampled[0].flatten(1).T, atol=1e-5, rtol=0)
    assert other.shape == (15, 32)


def test_teachers_are_frozen_and_loading_twice_gives_the_same_bits(directory: Path) -> None:
    for name, patch_size_px in (("siglip2", 4), ("dinov3", 8)):
        images = images_of(GRIDS, patch_size_px)
        first, second = (load_teacher(str(directory / name), "fp32") for _ in range(2))
        assert not first.model.training
        assert not any(parameter.requires_grad for parameter in first.model.parameters())
        pairs = zip(first.features(images, GRIDS), second.features(images, GRIDS), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert first.features([], []) == []


def test_bf16_is_near_fp32(directory: Path) -> None:
    for name, patch_size_px in (("siglip2", 4), ("dinov3", 8)):
        images = images_of(GRIDS, patch_size_px)
        exact, rounded = (
            torch.cat(load_teacher(str(directory / name), precision).features(images, GRIDS))
            for precision in ("fp32", "bf16")
        )
        assert rounded.dtype == torch.bfloat16
        assert F.cosine_similarity(exact, rounded.float()).min() > 0.999


def test_the_vision_part_of_a_whole_siglip2_is_loaded(directory: Path) -> None:
    path = directory / "siglip2_with_text"
    teacher = load_teacher(str(path), "fp32")
    whole = teachers.transformers.Siglip2Model.from_pretrained(path).vision_model.state_dict()
    loaded = teacher.model.state_dict()
    assert loaded and all(torch.equal(tensor, whole[name]) for name, tensor in loaded.items())


def test_preprocessing_that_the_checkpoint_states_is_used(directory: Path, tmp_path: Path) -> None:
    path = copy(directory / "dinov3", tmp_path / "satellite")
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    stated, default = inspect_teacher(str(path)), inspect_teacher(str(directory / "dinov3"))
    assert (stated.image_mean, stated.image_std) == ((0.4,) * 3, (0.2,) * 3)
    assert fingerprint(stated) != fingerprint(default)


def test_the_fingerprint_changes_with_a_weight_and_not_with_the_place(directory: Path, tmp_path: Path) -> None:
    original = fingerprint(inspect_teacher(str(directory / "siglip2")))
    path = copy(directory / "siglip2", tmp_path / "moved")
    assert fingerprint(inspect_teacher(str(path))) == original
    weights = load_file(path / "model.safetensors")
    weights["post_layernorm.bias"][0] += 1e-3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(inspect_teacher(str(path))) != original


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "no model_type"),
        (lambda path: (path / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
        (lambda path: (path / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 100), "does not load"),
        (lambda path: drop_weight(path / "model.safetensors", "post_layernorm.bias"), "lacks 1 weights"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused_in_one_line(directory: Path, tmp_path: Path, break_it, reason) -> None:
    path = copy(directory / "siglip2", tmp_path / "broken")
    break_it(path)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_teacher(str(path), "fp32")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["", "/does/not/exist", "no-such-owner/no-such-model"])
def test_a_path_that_is_neither_directory_nor_hub_name_is_refused(path: str) -> None:  # pytest is offline
    with pytest.raises(ConfigError) as caught:
        inspect_teacher(path)
    assert "\n" not in str(caught.value)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def drop_weight(path: Path, name: str) -> None:
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
