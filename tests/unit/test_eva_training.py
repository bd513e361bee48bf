"""EVA2-CLIP-E as it is trained gives what its released form gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvit import CogViT, CogViTConfig
from cogvit.errors import CheckpointError
from cogvit.model.eva_training import eva_encoder
from cogvit.model.image_input import ImageLimits, ImageSize, SquareImages, pack_shown
from tests.language import picture
from tests.plain_vit import scramble

SIDE_PX = 32
SQUARES = SquareImages(8, SIDE_PX)


def trained(**options: Any) -> CogViT:
    values = {"norm_after": True, "use_qk_norm": False} | options
    vit = CogViT(CogViTConfig(SIDE_PX, 8, 3, 48, 3, 4, 2.5, **values))
    scramble(vit)
    return vit.eval()


def test_the_released_form_has_the_same_features() -> None:
    vit = trained().double()  # what differs there is the computation, not its rounding
    images = pack_shown([picture(40, 30, seed) for seed in range(3)], SQUARES, 8, torch.device("cpu"))
    expected = vit.forward_packed(images).patch_TD
    found = eva_encoder(vit, SQUARES).forward_packed(images).patch_TD
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "shown", "message"),
    [
        ({"norm_after": False}, SQUARES, "norms behind its branches"),
        ({"use_qk_norm": True, "use_cls_token": False}, SQUARES, "a CLS token; no QK-norm"),
        ({}, SquareImages(8, 64), "squares of 32 px"),
        ({}, ImageLimits(8, 64.0, 1024.0), "squares of 32 px"),
    ],
)
def test_what_the_released_form_has_not_is_named(options: dict[str, Any], shown: ImageSize, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        eva_encoder(trained(**options), shown)
