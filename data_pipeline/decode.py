"""Encoded image bytes to pixels and patches: the one decoder that students, teachers and evaluation share.

Whatever goes wrong with foreign bytes becomes a DataError; callers give the image weight 0. Nothing is decoded before
the size in its header is accepted.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from math import ceil

import numpy as np
import simplejpeg
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from cogvit.errors import DataError
from cogvit.model.naflex import resize_to_grid
from cogvit.model.packing import patchify
from data_pipeline.augment import PLAIN, View

Pixels = NDArray[np.uint8]  # [H, W, 3]

# Of damaged metadata, one a picture, with a path inside the environment; what is damaged is not used.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS = 89_478_485  # what Pillow itself takes for a decompression bomb
# Pillow reads forty more, and hands EPS to Ghostscript, whatever the file is called.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
_PHONE_JPEG = "MPO"  # a JPEG with further pictures behind the first
_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, as a decompression bomb has; shrink the image"
_EXIF_MARK = b"Exif\0\0"
_JPEG_MARK = b"\xff\xd8\xff"


@dataclass(frozen=True, slots=True)
class Header:
    """What an image's first bytes say."""

    height_px: int  # upright
    width_px: int
    format: str  # lower case


def read_header(data: bytes) -> Header:
    """Read the size, EXIF orientation applied, and the format, without decoding.

    Errors: DataError when it is no image or has more than MAX_PIXELS; its message is a reason to count by.
    """
    try:
        image = _open(data)
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise about anything on foreign bytes
        raise DataError("the header does not parse") from error
    orientation = _orientation(image)
    height_px, width_px = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    return Header(height_px, width_px, "jpeg" if image.format == _PHONE_JPEG else str(image.format).lower())


def read_image(data: bytes, at_least_hw_px: tuple[int, int] | None = None) -> Pixels:
    """Decode to uint8 [H, W, 3]: first frame, orientation applied, transparency on white, deep samples cut to 8 bits.

    With at_least_hw_px a JPEG may be decoded at a fraction of its size (in the DCT), never below that size.
    Errors: DataError when it does not decode.
    """
    try:
        pixels = _read_jpeg(data, at_least_hw_px or (0, 0)) if data.startswith(_JPEG_MARK) else None
        return upright_pixels(_open(data)) if pixels is None else pixels
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"does not decode: {error}") from error


def read_image_at(data: bytes, size_hw_px: tuple[int, int], view: View = PLAIN) -> Tensor:
    """Decode and resize, bilinear and antialiased, to uint8 [3, height, width], as a view shows the image.

    Errors: DataError when it does not decode.
    """
    # Twice the target leaves the antialiasing filter its full support.
    height_px, width_px = (ceil(2 * side_px / view.side) for side_px in size_hw_px)
    pixels = view.cut(read_image(data, (height_px, width_px)))
    image = rearrange(torch.from_numpy(pixels), "h w c -> c h w")
    return view.finish(resize_to_grid(image, size_hw_px, patch_size=1))


def decode_patches(data: bytes, grid_hw: tuple[int, int], patch_size_px: int, view: View = PLAIN) -> Tensor:
    """Decode, resize to a grid of patches and cut, as the student sees an image: uint8 [n, 3 * P * P].

    Patches go row by row, each channel-major like a flat Conv2d weight.
    Errors: DataError when it does not decode.
    """
    size_hw_px = (grid_hw[0] * patch_size_px, grid_hw[1] * patch_size_px)
    return patchify(read_image_at(data, size_hw_px, view), patch_size_px)


def _open(data: bytes) -> Image.Image:
    """Parse a header with Pillow. Errors: DataError for an unknown format or too many pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError("no known image format, or a damaged header") from None
    except Image.DecompressionBombError:
        raise DataError(_TOO_LARGE) from None
    _check_pixels(image.height, image.width)
    return image


def _read_jpeg(data: bytes, at_least_hw_px: tuple[int, int]) -> Pixels | None:
    """Decode a JPEG with simplejpeg; None where it gives up (CMYK, oddities), which Pillow may still read."""
    orientation = _orientation(_open(data)) if _EXIF_MARK in data else 1
    min_height, min_width = at_least_hw_px if orientation < 5 else at_least_hw_px[::-1]
    try:
        height_px, width_px, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height_px, width_px)
        # Only halvings pay: libjpeg-turbo takes longer for 6/8 or 7/8 of the size than for all of it.
        halvings = [k for k in (1, 2, 3) if min_height << k <= height_px and min_width << k <= width_px]
        smallest = max(halvings, default=0) if min_height and min_width else 0
        pixels = simplejpeg.decode_jpeg(data, min_height=height_px >> smallest, min_width=width_px >> smallest)
    except ValueError:
        return None
    return _turn_upright(pixels, orientation)


def upright_pixels(image: Image.Image) -> Pixels:
    """Decode uint8 [H, W, 3]: first frame, orientation applied, transparency on white, deep samples cut to 8 bits."""
    orientation = _orientation(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return _turn_upright(np.array(image if image.mode == "RGB" else image.convert("RGB")), orientation)


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 5..8 are stored transposed, and each of the four flips occurs with and without."""
    if orientation in (5, 6, 7, 8):
        pixels = rearrange(pixels, "h w c -> w h c")
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Cut deep gray samples: 16-bit integers by their high byte, floats as [0, 1]."""
    samples = np.asarray(image)
    scaled = 255.0 * np.nan_to_num(samples).clip(0.0, 1.0) if samples.dtype.kind == "f" else samples / 257.0
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1..8); 1 where the EXIF is damaged, as browsers have it.

    Only what lies before the pixels counts, so that no header read decodes.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        orientation = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above
        return 1
    return orientation if orientation in range(1, 9) else 1


def _check_pixels(height_px: int, width_px: int) -> None:
    if height_px * width_px > MAX_PIXELS:
        raise DataError(_TOO_LARGE)
    if min(height_px, width_px) < 1:
        raise DataError("the image has no pixels")
