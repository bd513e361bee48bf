"""Saving to and loading from a directory of config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvit.errors import CheckpointError
from cogvit.model.vit import CogViT
from tests.plain_vit import FAMILIES, tiny_config, tiny_vit


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_round_trip_is_exact(tmp_path: Path, options: dict[str, object]) -> None:
    model = tiny_vit(**options).float()
    model.save_pretrained(tmp_path / "new" / "export")
    loaded = CogViT.from_pretrained(tmp_path / "new" / "export")
    assert loaded.cfg == model.cfg
    x = torch.randn(1, 3, 16, 24)
    assert torch.equal(loaded(x)["patch_tokens"], model(x)["patch_tokens"])


def test_every_wrong_weight_is_named(tmp_path: Path) -> None:
    CogViT(tiny_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["norm.weight"]
    weights["head.weight"] = torch.zeros(2)
    weights["mask_token"] = torch.zeros(1, 1, 5)
    save_file(weights, path)
    with pytest.raises(CheckpointError) as error:
        CogViT.from_pretrained(tmp_path)
    message = str(error.value)
    assert "norm.weight is missing" in message
    assert "head.weight is unknown" in message
    assert "mask_token has shape (1, 1, 5), expected (1, 1, 32)" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json does not exist"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "siglip"}', "not of a CogViT"),
        ('{"architecture": "vit_base_patch16_224", "num_classes": 0}', "not of a CogViT: model_type is None"),
        ('{"model_type": "cogvit", "width": 3}', "unknown configuration field width"),
        ('{"model_type": "cogvit", "num_heads": 5}', "num_heads=5 does not divide"),
        ('{"model_type": "cogvit", "depth": "two"}', "config.json: depth='two' is not of type int"),
        ('{"objective": "contrast", "vision": {}}', "is a run; python -m tools.export"),
    ],
)
def test_bad_configurations(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        CogViT.from_pretrained(tmp_path)


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    CogViT(tiny_config()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["embed_dim"] == 32
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        CogViT.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        CogViT.from_pretrained(tmp_path)


def test_what_is_no_directory_is_one_line(tmp_path: Path) -> None:
    """A file of weights, as others pass it, and a folder of pickles."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"config\.json does not exist; is .* an export\?$"):
            CogViT.from_pretrained(path)
