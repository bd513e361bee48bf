"""Augmentation, drawn from an image's key: student and teachers see the same picture, and a replay sees it again.

Everything here is stated so that it does not depend on the size at which an image is decoded: places are shares of the
image's sides, and colors change pixel by pixel. A crop has the aspect of its image, so that the plan's grids stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.config import DataConfig
from cogvit.draws import uniform

_FLIP_SALT = 0x666C6970  # "flip"
_CROP_SALTS = (0x61726561, 0x746F7020, 0x6C656674)  # "area", "top ", "left"
_COLOR_SALTS = (0x62726967, 0x636F6E74, 0x73617475)  # "brig", "cont", "satu"
_LUMA = (0.299, 0.587, 0.114)
_MIDDLE = 127.5  # contrast is about the middle of the range: about the image's mean it would depend on its size


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What a run draws for its images."""

    flip: bool = False  # mirror half of them
    crop: float = 1.0  # the smallest share of the area that is kept
    color: float = 0.0  # the largest relative change of brightness, contrast and saturation


@dataclass(frozen=True, slots=True)
class View:
    """How one image is seen."""

    mirrored: bool = False
    top: float = 0.0  # of the crop, as a share of the height
    left: float = 0.0
    side: float = 1.0  # of the crop, as a share of each side
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factors of brightness, contrast and saturation

    def cut(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the crop out of a decoded image [H, W, 3]: at least a pixel, to the nearest whole ones."""
        if self.side == 1.0:
            return image
        (top, bottom), (left, right) = (
            _span(start, self.side, size) for start, size in zip((self.top, self.left), image.shape[:2], strict=True)
        )
        return image[top:bottom, left:right]

    def finish(self, image: Tensor) -> Tensor:
        """Mirror and recolor a resized image, uint8 [3, H, W]."""
        image = image.flip(2) if self.mirrored else image
        brightness, contrast, saturation = self.color
        if self.color == (1.0, 1.0, 1.0):
            return image
        x = (image.float() * brightness - _MIDDLE) * contrast + _MIDDLE
        gray = torch.einsum("chw,c->hw", x, x.new_tensor(_LUMA))
        return (gray + saturation * (x - gray)).round().clamp(0, 255).to(torch.uint8)


AS_IT_IS, PLAIN = Augmentation(), View()


def augmentation_of(data: DataConfig) -> Augmentation:
    """Return what a configuration asks for."""
    return Augmentation(data.flip, data.crop, data.color)


def views_of(key: NDArray[np.int64], augmentation: Augmentation) -> list[View]:
    """Draw how each of B images is seen; key is [B]."""
    if augmentation == AS_IT_IS:
        return [PLAIN] * len(key)
    key_B = torch.from_numpy(key)

    def draw(salt: int) -> NDArray[np.float64]:
        return uniform(key_B, salt).numpy().astype(np.float64)

    mirrored = (draw(_FLIP_SALT) < 0.5) & augmentation.flip
    area, top, left = (draw(salt) for salt in _CROP_SALTS)
    side = (
        np.sqrt(augmentation.crop + (1.0 - augmentation.crop) * area) if augmentation.crop < 1.0 else np.ones(len(key))
    )
    color = np.stack([1.0 + augmentation.color * (2.0 * draw(salt) - 1.0) for salt in _COLOR_SALTS], axis=1)
    rows = zip(
        mirrored.tolist(), (top * (1.0 - side)).tolist(), (left * (1.0 - side)).tolist(), side.tolist(), strict=True
    )
    return [View(*row, color=(a, b, c)) for row, (a, b, c) in zip(rows, color.tolist(), strict=True)]


def _span(start: float, length: float, size: int) -> tuple[int, int]:
    """Return where a stretch that is given in shares of a side begins and ends in pixels."""
    first = min(round(start * size), size - 1)
    return first, max(first + 1, min(round((start + length) * size), size))
