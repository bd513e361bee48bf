"""Images as a vision-language model takes them: one rule for their size, and their patches.

The rule is that of GLM-OCR's processor, so that transformers sees the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cogvit.batch import PackedImages, to_device
from cogvit.errors import DataError
from cogvit.model.images import ImageLike, Source
from cogvit.model.packing import Grid, pack_images, patchify

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_ASPECT = 200  # of the published rule


@dataclass(frozen=True)
class ImageLimits:
    """How large an image is shown.

    Attributes:
        unit_px: sides are multiples of it: the patch times the adapter's spatial_pool.
        min_pixels: a smaller image is enlarged.
        max_pixels: a larger image is made smaller.

    Errors: ValueError when the limits cannot be kept.
    """

    unit_px: int
    min_pixels: float
    max_pixels: float

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < self.unit_px**2:
            raise ValueError(
                f"min_pixels={self.min_pixels:g} and max_pixels={self.max_pixels:g} must be in this order and leave"
                f" room for one group of {self.unit_px} x {self.unit_px} px"
            )

    def size_px(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return the height and width that an image is resized to: whole units, the aspect about kept.

        Errors: DataError when a side is more than 200 times the other.
        Source: `smart_resize` of transformers 5.23, models/glm46v.
        """
        height, width, unit = height_px, width_px, self.unit_px
        if height < unit or width < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise DataError(
                f"an image of {height_px} x {width_px} px is too thin; one side may be {_MAX_ASPECT} times the other"
            )
        near = round(height / unit) * unit, round(width / unit) * unit
        if near[0] * near[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = math.floor(height / shrink / unit), math.floor(width / shrink / unit)
            return max(rows, 1) * unit, max(columns, 1) * unit
        if near[0] * near[1] < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * stretch / unit) * unit, math.ceil(width * stretch / unit) * unit
        return near


def rgb_image(image: ImageLike) -> Image:
    """Return one of a user's images as an RGB image of PIL, decoded as `CogViT.encode` decodes it.

    Errors: DataError when it cannot be read, is no image, or is a tensor of floats.
    """
    from PIL import Image as pil  # only users of images pay for it

    source = Source(image, "the image")
    pixels = source.pixels(source.size_hw_px)
    if pixels.dtype != torch.uint8:
        raise DataError(f"the image is {pixels.dtype} of {tuple(pixels.shape)}; expected torch.uint8 of (3, H, W)")
    return pil.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().cpu().numpy())


def image_patches(image: Image, limits: ImageLimits, patch_px: int) -> tuple[Tensor, Grid]:
    """Return the patches of an image, uint8 [rows * columns, 3 * P * P], and their grid."""
    from PIL.Image import Resampling

    height_px, width_px = limits.size_px(image.height, image.width)
    if (image.height, image.width) != (height_px, width_px):
        image = image.resize((width_px, height_px), Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    image_CHW = rearrange(pixels, "(h w c) -> c h w", h=height_px, c=3)
    return patchify(image_CHW, patch_px), (height_px // patch_px, width_px // patch_px)


def pack_shown(images: Sequence[Image], limits: ImageLimits, patch_px: int, device: torch.device) -> PackedImages:
    """Return images as one pack for `CogViT.forward_packed`, each in its size."""
    shown = [image_patches(image, limits, patch_px) for image in images]
    return to_device(pack_images([patches for patches, _ in shown], [grid for _, grid in shown]), device)
