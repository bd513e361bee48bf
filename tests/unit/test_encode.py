"""The encoder in a user's hands: images of any kind to features, texts to embeddings, graphs for other runtimes."""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from cogvit import CogViT, CogViTForContrastive
from cogvit.config import DataConfig
from cogvit.errors import CheckpointError, CogViTError, ConfigError, DataError
from cogvit.evaluation.features import embed_texts
from cogvit.evaluation.subject import load_subject
from cogvit.model.fixed import FixedGridEncoder, write_program
from cogvit.model.image_input import rgb_image
from cogvit.model.preprocess import Preprocessing, image_packs
from data_pipeline.decode import decode_patches, read_image
from tests.runs_on_disk import VISION, contrast_run, write_shards
from tools.export import Arguments, export

ROTARY = replace(VISION, norm="rmsnorm", mlp="swiglu", position="rotary", use_cls_token=False)


def picture(height_px: int, width_px: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height_px).integers(0, 255, (height_px, width_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def encoder() -> CogViT:
    torch.manual_seed(0)
    encoder = CogViT(VISION).eval()
    encoder.preprocessing = Preprocessing(max_patches=24, multiple=2)
    return encoder


def test_images_of_any_kind_and_size_give_the_same_features(encoder: CogViT, tmp_path: Path) -> None:
    image = picture(20, 33)
    image.save(tmp_path / "image.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    same = [image, np.array(image), pixels, tmp_path / "image.png", str(tmp_path / "image.png")]
    found = encoder.encode([*same, picture(7, 90), pixels / 127.5 - 1.0], tokens_per_pack=60)
    assert [tuple(x.shape[:2]) for x in found.patches] == [(4, 6)] * 5 + [(2, 12), (4, 6)]
    for patches, pooled in zip(found.patches[1:5], found.pooled[1:5], strict=True):
        torch.testing.assert_close(patches, found.patches[0])
        torch.testing.assert_close(pooled, found.patches[0].mean((0, 1)))
    torch.testing.assert_close(found.pooled[6], found.pooled[0], atol=2e-2, rtol=0.0)  # uint8 is rounded when resized
    assert not found.pooled.requires_grad


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_packs_are_those_of_training_to_the_bit(encoder: CogViT, mode: str) -> None:
    """PIL images of every mode, against training's decoder on the same file."""
    image = picture(50, 41) if mode == "I;16" else picture(50, 41, mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(50 * 41, dtype=np.uint16).reshape(50, 41) * 30)
    if mode == "RGBA":
        image.putalpha(90)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    (pack,) = image_packs([Image.open(io.BytesIO(buffer.getvalue()))], encoder.preprocessing, VISION, 100)
    rows, columns = pack.grid_hw.tolist()[0]
    assert pack.patches.dtype == torch.uint8
    assert torch.equal(pack.patches, decode_patches(buffer.getvalue(), (rows, columns), VISION.patch_size))
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert np.array_equal(rgb_image(url), read_image(buffer.getvalue()))  # what a language model is shown


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_images_of_every_mode_are_taken(encoder: CogViT, mode: str) -> None:
    found = encoder.encode([picture(20, 33).convert("L" if mode == "F" else "RGB").convert(mode)])
    assert found.patches[0].shape[:2] == (4, 6) and bool(found.pooled.isfinite().all())


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("side_px", [40, 300])
def test_files_of_jpeg_are_decoded_as_training_does(
    encoder: CogViT, tmp_path: Path, side_px: int, orientation: int
) -> None:
    """A large one at a fraction of its size."""
    exif = Image.Exif()
    exif[274] = orientation
    picture(side_px, 2 * side_px).resize((2 * side_px, side_px)).save(tmp_path / "x.jpg", exif=exif, quality=90)
    (pack,) = image_packs([tmp_path / "x.jpg"], encoder.preprocessing, VISION, 100)
    (grid,) = pack.grid_hw.tolist()
    assert torch.equal(pack.patches, decode_patches((tmp_path / "x.jpg").read_bytes(), tuple(grid), VISION.patch_size))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "the list of images is empty"),
        ("x.png", "expected a list of images, not one str"),
        (picture(4, 4), "expected a list of images, not one Image"),
        (None, "expected a list of images, not one NoneType"),
        (["absent.png"], r"image 0 \(absent.png\) cannot be read: No such file"),
        ([__file__], "is no image: no known image format"),
        (["https://example.org/a.png"], "on another machine; save it first"),
        (["data:image/png;base64,@@@"], r"image 0 \(data:image/png;base64,@@@\) is no image: its base64 is damaged"),
        ([picture(4, 4), 7], "image 1 is a int; expected a PIL image, a uint8 array"),
        ([np.zeros((4, 4, 3), np.float32)], "float32 of .*; expected uint8 of"),
        ([torch.zeros(4, 4, 3)], r"shape \(4, 4, 3\); expected \(3, H, W\)"),
        ([torch.full((3, 8, 8), 255.0)], r"values from 255 to 255; floats are in \[-1, 1\]"),
        ([torch.full((3, 8, 8), float("nan"))], "floats are in"),
        ([torch.zeros(3, 0, 8, dtype=torch.uint8)], "no pixels"),
    ],
)
def test_what_is_no_image_is_one_line(encoder: CogViT, images: object, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as found:
        encoder.encode(images)  # type: ignore[arg-type]
    assert "\n" not in str(found.value)


def test_an_export_says_how_training_prepared_images(encoder: CogViT, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        encoder.save_pretrained(tmp_path / "export")
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "export").iterdir()} == {0o640}
    loaded = CogViT.from_pretrained(tmp_path / "export")
    assert loaded.preprocessing == encoder.preprocessing and not loaded.training
    image = [picture(30, 50)]
    assert torch.equal(loaded.encode(image).pooled, encoder.encode(image).pooled)
    half = CogViT.from_pretrained(str(tmp_path / "export"), dtype="bf16").encode(image)
    assert half.patches[0].dtype == torch.bfloat16
    torch.testing.assert_close(half.pooled, encoder.encode(image).pooled, atol=0.1, rtol=0.1)
    values = json.loads((tmp_path / "export" / "preprocessor_config.json").read_text())
    (tmp_path / "export" / "preprocessor_config.json").write_text(json.dumps(values | {"resample": 3}))
    with pytest.raises(CheckpointError, match="has resample=3; this encoder has 2"):
        CogViT.from_pretrained(tmp_path / "export")
    with pytest.raises(ConfigError, match="dtype='int8' is unknown; expected one of float32"):
        CogViT.from_pretrained(tmp_path / "export", dtype="int8")


def test_a_run_and_its_export_prepare_images_alike(tmp_path: Path) -> None:
    run = contrast_run(tmp_path / "run", DataConfig(sizing="square"))
    assert export(Arguments(str(run), str(tmp_path / "export"))) == 0
    rows, columns = VISION.base_grid
    assert CogViT.from_pretrained(tmp_path / "export").preprocessing == Preprocessing(rows * columns, square=True)


def test_two_towers_in_python_are_those_of_evaluation(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data")
    run = contrast_run(tmp_path / "run", data)
    assert export(Arguments(str(run), str(tmp_path / "export"), layout="two_towers")) == 0
    model = CogViTForContrastive.from_pretrained(tmp_path / "export")
    captions = ["a red picture", "\u56fe1", "x" * 99]
    found = torch.nn.functional.normalize(model.encode_text(captions), dim=1)
    torch.testing.assert_close(found, embed_texts(load_subject(run), captions))
    embedded = model.encode_image([picture(20, 30), picture(9, 9)])
    torch.testing.assert_close(
        embedded, model.vision_proj(model.vision.encode([picture(20, 30), picture(9, 9)]).pooled)
    )
    model.save_pretrained(tmp_path / "again")
    again = CogViTForContrastive.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert again.encode_text(captions).dtype == torch.bfloat16
    for texts, expected in (("one", "put it into a list"), ([], "is empty"), ([3], "text 0 is a int")):
        with pytest.raises(DataError, match=expected):
            model.encode_text(texts)  # type: ignore[arg-type]
    model.vision.save_pretrained(tmp_path / "vision")
    with pytest.raises(CheckpointError, match="has no text side; export the run with --layout two_towers"):
        CogViTForContrastive.from_pretrained(tmp_path / "vision")


@pytest.mark.parametrize("cfg", [VISION, ROTARY, replace(ROTARY, use_cls_token=True, layer_scale_init=0.3)])
def test_one_grid_gives_the_features_of_packs(cfg, tmp_path: Path) -> None:
    torch.manual_seed(1)
    vit = CogViT(cfg).eval()
    fixed, images = FixedGridEncoder(vit, (3, 5)), torch.rand(3, 3, 12, 20) * 2 - 1
    with torch.no_grad():
        expected = vit(images)["patch_tokens"]
        patches, pooled = fixed(images)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.mean(1), atol=1e-5, rtol=1e-5)


def test_the_dense_path_compiles_as_one_graph() -> None:
    vit = CogViT(replace(ROTARY, depth=1)).eval()
    images = torch.rand(2, 3, 12, 20) * 2 - 1
    with torch.no_grad():
        whole = torch.compile(FixedGridEncoder(vit, (3, 5)), fullgraph=True, backend="aot_eager")(images)[0]
        torch.testing.assert_close(whole, vit(images)["patch_tokens"], atol=1e-5, rtol=1e-5)


def test_graphs_for_other_runtimes_give_the_features(tmp_path: Path) -> None:
    torch.manual_seed(2)
    vit = CogViT(ROTARY).eval()
    images = torch.rand(3, 3, 8, 16) * 2 - 1
    with torch.no_grad():
        expected = vit(images)["patch_tokens"]
    session = onnxruntime.InferenceSession(write_program(tmp_path / "onnx", vit, (2, 4), "onnx"))
    patches, pooled = session.run(["patch_features", "pooled"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(patches), expected, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(torch.from_numpy(pooled), expected.mean(1), atol=1e-4, rtol=0.0)
    program = torch.export.load(write_program(tmp_path / "pt2", vit, (2, 4), "pt2"))
    torch.testing.assert_close(program.module()(images)[0], expected, atol=1e-4, rtol=0.0)
    values = json.loads((tmp_path / "onnx" / "preprocessor_config.json").read_text())
    assert values["size"] == {"height": 8, "width": 16} and values["sizing"] == "square"


def test_transformers_loads_an_export(encoder: CogViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    encoder.save_pretrained(tmp_path / "export")
    model = AutoModel.from_pretrained(tmp_path / "export", trust_remote_code=True)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        output, expected = model(images), encoder(images)["patch_tokens"]
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(output.pooler_output, expected.mean(1), atol=1e-5, rtol=0.0)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_hub_that_is_not_there_is_one_line(encoder: CogViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for call in (lambda: CogViT.from_pretrained("nobody/nothing"), lambda: encoder.push_to_hub("nobody/nothing")):
        with pytest.raises(CogViTError, match="nobody/nothing") as found:
            call()
        assert "\n" not in str(found.value)


def test_the_encoder_needs_nothing_of_training() -> None:
    """In a fresh interpreter: five lines give features, and no library of training is loaded."""
    code = """
import sys, numpy, torch
from cogvit import CogViT, CogViTConfig
vit = CogViT(CogViTConfig(embed_dim=32, depth=1, num_heads=2, image_size=28))
print(vit.encode([numpy.zeros((30, 40, 3), numpy.uint8)]).pooled.shape)
heavy = {"ray", "deepspeed", "megatron", "transformers", "pyarrow", "wandb", "fsspec", "data_pipeline"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch.Size([1, 32])", "[]"]
