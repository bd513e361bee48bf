"""The sizes of the two families: parameter counts to the last one, and what they share with the published models."""

from __future__ import annotations

import pytest
import torch

from cogvit import CogViT, CogViTConfig
from cogvit.model.text import TextTower
from configs.models import Size, cogvit_l_vision, cogvit_vision, reference_vision, text_tower


def parameters(cfg: CogViTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CogViT(cfg).parameters())


SIZES: list[tuple[Size, int, int]] = [
    ("tiny", 5_504_448, 7_227_456),
    ("small", 21_622_656, 28_609_152),
    ("base", 85_709_568, 113_839_872),
    ("large", 303_184_896, 403_630_080),
    ("so400m", 412_452_432, 546_076_944),
]


@pytest.mark.parametrize(("size", "reference", "cogvit"), SIZES)
def test_parameter_counts(size: Size, reference: int, cogvit: int) -> None:
    assert parameters(reference_vision(size)) == reference
    assert parameters(cogvit_vision(size)) == cogvit


def test_text_towers_have_the_size_of_their_vision_towers() -> None:
    for size, reference, _ in SIZES:
        tower = text_tower(size)
        with torch.device("meta"):
            blocks = sum(parameter.numel() for parameter in TextTower(tower).blocks.parameters())
            expected = sum(parameter.numel() for parameter in CogViT(reference_vision(size)).blocks.parameters())
        assert blocks == expected < reference and tower.vocab_size == 256_000


def test_the_published_models() -> None:
    assert reference_vision() == CogViTConfig()
    assert cogvit_vision() == cogvit_l_vision()
    with torch.device("meta"):
        blocks = CogViT(cogvit_l_vision()).blocks
    assert round(sum(parameter.numel() for parameter in blocks.parameters()) / 1e6, 1) == 403.0  # as GLM-OCR's


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "so400m"])
def test_hidden_widths_survive_the_ratio(size: Size) -> None:
    hidden = {"tiny": 768, "small": 1536, "base": 3072, "large": 4096, "so400m": 4304}[size]
    assert reference_vision(size).mlp_dim == cogvit_vision(size).mlp_dim == hidden
