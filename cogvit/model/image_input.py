"""Images as a vision-language model takes them: one rule for their size, and their patches.

The rule is that of GLM-OCR's processor, so that transformers sees the same pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cogvit.batch import PackedImages, to_device
from cogvit.errors import DataError
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


def open_image(source: Image | Tensor | str | Path) -> Image:
    """Return an RGB image of PIL.

    Args:
        source: a PIL image, uint8 [3, H, W], a path or a data URL (`data:image/png;base64,...`).

    Errors: DataError when it cannot be read or is no image.
    """
    from PIL import Image as pil  # only users of images pay for it
    from PIL import ImageOps

    if isinstance(source, pil.Image):
        return source.convert("RGB")
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3:
            raise DataError(f"an image is {source.dtype} of {tuple(source.shape)}; expected torch.uint8 of (3, H, W)")
        return pil.fromarray(rearrange(source, "c h w -> h w c").contiguous().cpu().numpy())
    shown = str(source)[:60]
    try:
        is_url = str(source).startswith(("data:", "http:", "https:"))
        opened = pil.open(io.BytesIO(_from_url(str(source))) if is_url else source)
        return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"the image {shown} does not exist") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise about anything on foreign bytes
        raise DataError(f"the image {shown} does not decode: {error}") from None


def _from_url(url: str) -> bytes:
    """The bytes of a data URL. Errors: DataError for any other, ValueError for one that is damaged."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise DataError(f"the image {url[:60]} is on another machine; save it first and pass its path or a data URL")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from None


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
