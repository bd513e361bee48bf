"""One door for images: whatever a user has becomes pixels as training sees them.

Training's decoder (`data_pipeline.decode`) uses the same parts, and a faster library for JPEG. Pillow is imported where
an image is opened: `import cogvit` needs none of it.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from cogvit.errors import DataError

if TYPE_CHECKING:  # `import cogvit` loads no more of numpy than torch has
    from numpy.typing import NDArray
    from PIL.Image import Image

Pixels: TypeAlias = "NDArray[np.uint8]"  # [H, W, 3]
ImageLike: TypeAlias = Union["Image", "NDArray[np.uint8]", Tensor, str, "os.PathLike[str]"]

MAX_PIXELS = 89_478_485  # what Pillow itself takes for a decompression bomb
# Pillow reads forty more, and hands EPS to Ghostscript, whatever the file is called.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")  # an MPO is opened as a JPEG
_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, as a decompression bomb has; shrink the image"
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


def open_image(data: bytes) -> Image:
    """Parse an image's header; nothing is decoded. Errors: DataError for an unknown format or too many pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError("no known image format, or a damaged header") from None
    except Image.DecompressionBombError:
        raise DataError(_TOO_LARGE) from None
    check_pixels(image.height, image.width)
    return image


def upright_pixels(image: Image) -> Pixels:
    """Decode uint8 [H, W, 3]: first frame, orientation applied, transparency on white, deep samples cut to 8 bits."""
    from PIL import Image as pillow

    orientation = orientation_of(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    elif image.mode in _TRANSPARENT or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = pillow.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return turn_upright(np.array(image if image.mode == "RGB" else image.convert("RGB")), orientation)


def upright_size(image: Image) -> tuple[int, int]:
    """Return height and width with the orientation applied, without decoding."""
    sideways = orientation_of(image) >= 5
    return (image.width, image.height) if sideways else (image.height, image.width)


def orientation_of(image: Image) -> int:
    """Return the EXIF orientation (1..8); 1 where the EXIF is damaged, as browsers have it.

    Only what lies before the pixels counts, so that no header read decodes.
    """
    from PIL import ExifTags
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        orientation = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parsers raise about anything on foreign bytes
        return 1
    return orientation if orientation in range(1, 9) else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5..8 are stored transposed, and each of the four flips occurs with and without."""
    if orientation in (5, 6, 7, 8):
        pixels = rearrange(pixels, "h w c -> w h c")
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def check_pixels(height_px: int, width_px: int) -> None:
    """Refuse an image without pixels or with too many. Errors: DataError."""
    if height_px * width_px > MAX_PIXELS:
        raise DataError(_TOO_LARGE)
    if min(height_px, width_px) < 1:
        raise DataError("the image has no pixels")


def halvings(size_hw_px: tuple[int, int], at_least_hw_px: tuple[int, int]) -> int:
    """Return how often a JPEG may be halved as it is decoded (in the DCT) without falling below a size."""
    # Only halvings pay: libjpeg-turbo takes longer for 6/8 or 7/8 of the size than for all of it.
    (height, width), (min_height, min_width) = size_hw_px, at_least_hw_px
    return max((k for k in (1, 2, 3) if min_height << k <= height and min_width << k <= width), default=0)


def decode_size(height_px: float, width_px: float) -> tuple[int, int]:
    """Return the least size to decode for a resize to this one: twice it leaves the filter its full support."""
    return ceil(2 * height_px), ceil(2 * width_px)


class Source:
    """One of a user's images: its size is known at once, its pixels when they are asked for.

    Args:
        image: a PIL image, uint8 [H, W, 3] or [H, W], a tensor [3, H, W] (uint8, or floats in [-1, 1]), a path or a
            data URL (`data:image/png;base64,...`).
        name: what errors call it.

    Errors: DataError when it is none of these, does not exist or is no image.
    """

    def __init__(self, image: ImageLike, name: str) -> None:
        self._name = name
        self._drawn = False  # whether the file is ours to decode at a fraction of its size
        if isinstance(image, Tensor):
            self._image: Image | Tensor = _checked_tensor(image, name)
            self.size_hw_px: tuple[int, int] = (image.shape[1], image.shape[2])
        elif isinstance(image, np.ndarray):
            self._image = _checked_array(image, name)
            self.size_hw_px = (self._image.shape[1], self._image.shape[2])
        else:
            if isinstance(image, (str, os.PathLike)):
                self._name, self._drawn = f"{name} ({_shown(os.fspath(image))})", True
                self._image = self._opened(image)
            elif hasattr(image, "getexif") and hasattr(image, "convert"):
                self._image = image
            else:
                raise DataError(
                    f"{name} is a {type(image).__name__}; expected a PIL image, a uint8 array [H, W, 3], a tensor"
                    " [3, H, W] or a path"
                )
            self.size_hw_px = upright_size(self._image)
        check_pixels(*self.size_hw_px)

    def pixels(self, at_least_hw_px: tuple[int, int]) -> Tensor:
        """Return [3, H, W], uint8 or floats in [-1, 1]; a JPEG file may be decoded smaller, never below a size.

        Errors: DataError when it does not decode.
        """
        image = self._image
        if isinstance(image, Tensor):
            return image
        try:
            if self._drawn and image.format in ("JPEG", "MPO"):
                sideways = orientation_of(image) >= 5
                image.draft("RGB", at_least_hw_px if sideways else at_least_hw_px[::-1])
            return rearrange(torch.from_numpy(upright_pixels(image)), "h w c -> c h w")
        except Exception as error:  # Pillow's decoders raise about anything on foreign bytes
            raise DataError(f"{self._name} does not decode: {error}") from error

    def _opened(self, where: str | os.PathLike[str]) -> Image:
        try:
            return open_image(_bytes_of(where))
        except OSError as error:
            raise DataError(f"{self._name} cannot be read: {error.strerror}") from None
        except Exception as error:
            raise DataError(f"{self._name} is no image: {error}") from None


def sources_of(images: Sequence[ImageLike] | Tensor) -> list[Source]:
    """Return a user's images as sources.

    Errors: DataError when there are none, one is no image, or floats are mixed with other images.
    """
    if isinstance(images, (str, os.PathLike)) or not hasattr(images, "__len__"):
        raise DataError(f"expected a list of images, not one {type(images).__name__}; put it into a list")
    if not len(images):
        raise DataError("the list of images is empty; expected at least one")
    return [Source(image, f"image {number}") for number, image in enumerate(images)]


def _bytes_of(where: str | os.PathLike[str]) -> bytes:
    """Return what lies at a path or in a data URL. Errors: OSError; DataError for another URL or damaged base64."""
    if not isinstance(where, str) or not where.startswith(("data:", "http:", "https:")):
        return Path(where).read_bytes()
    head, _, data = where.partition(",")
    if not head.startswith("data:"):
        raise DataError("it is on another machine; save it first and pass its path or a data URL")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"its base64 is damaged ({error})") from None


def _shown(where: str) -> str:
    """A path, or the beginning of a URL."""
    return f"{where[:60]}..." if where.startswith("data:") and len(where) > 60 else where


def _checked_tensor(image: Tensor, name: str) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3:
        raise DataError(f"{name} has shape {tuple(image.shape)}; expected (3, H, W)")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(f"{name} is {image.dtype}; expected torch.uint8, or floats in [-1, 1]")
    low, high = (float(bound) for bound in image.aminmax()) if image.numel() else (0.0, 0.0)
    if not (-1.1 <= low <= high <= 1.1):  # a resize may overshoot a little
        raise DataError(f"{name} has values from {low:.4g} to {high:.4g}; floats are in [-1, 1], or pass torch.uint8")
    return image


def _checked_array(image: NDArray[np.uint8], name: str) -> Tensor:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise DataError(f"{name} is {image.dtype} of {image.shape}; expected uint8 of (H, W, 3) or (H, W)")
    colors = image if image.ndim == 3 else repeat(image, "h w -> h w c", c=3)
    return rearrange(torch.from_numpy(np.ascontiguousarray(colors)), "h w c -> c h w")


def _to_8_bits(image: Image) -> Image:
    """Cut deep gray samples: 16-bit integers by their high byte, floats as [0, 1]."""
    from PIL import Image as pillow

    samples = np.asarray(image)
    scaled = 255.0 * np.nan_to_num(samples).clip(0.0, 1.0) if samples.dtype.kind == "f" else samples / 257.0
    return pillow.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
