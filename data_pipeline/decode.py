"""Encoded image bytes to pixels and patches: the one decoder that students, teachers and evaluation share.

Whatever goes wrong with foreign bytes becomes a DataError; callers give the image weight 0. Nothing is decoded before
the size in its header is accepted.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Protocol

import simplejpeg
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from cogvit.errors import DataError
from cogvit.model.images import (
    MAX_PIXELS,
    Pixels,
    check_pixels,
    decode_size,
    halvings,
    open_image,
    orientation_of,
    turn_upright,
    upright_pixels,
    upright_size,
)
from cogvit.model.naflex import resize_to_grid
from cogvit.model.packing import patchify
from data_pipeline.augment import PLAIN, View

__all__ = [
    "MAX_PIXELS",
    "Encoded",
    "Header",
    "Pixels",
    "decode_patches",
    "is_damaged_exif",
    "read_header",
    "read_image",
    "read_image_at",
]

# Of damaged metadata, one a picture, with a path inside the environment; what is damaged is not used.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_PHONE_JPEG = "MPO"  # a JPEG with further pictures behind the first
_EXIF_MARK = b"Exif\0\0"
_JPEG_MARK = b"\xff\xd8\xff"


class Shot(Protocol):
    """An image that is no file of its own: a frame of a video."""

    def pixels(self, at_least_hw_px: tuple[int, int]) -> Pixels:
        """Return uint8 [H, W, 3], upright, not below a size. Errors: DataError when it does not decode."""


Encoded = bytes | Shot


@dataclass(frozen=True, slots=True)
class Header:
    """What an image's first bytes say."""

    height_px: int  # upright
    width_px: int
    format: str  # lower case
    exif: bytes = field(default=b"", compare=False)  # as it stands before the pixels


def read_header(data: bytes) -> Header:
    """Read the size, EXIF orientation applied, and the format, without decoding.

    Errors: DataError when it is no image or has more than MAX_PIXELS; its message is a reason to count by.
    """
    try:
        image = open_image(data)
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise about anything on foreign bytes
        raise DataError("the header does not parse") from error
    format_name = "jpeg" if image.format == _PHONE_JPEG else str(image.format).lower()
    return Header(*upright_size(image), format_name, image.info.get("exif") or b"")


def is_damaged_exif(exif: bytes) -> bool:
    """Whether EXIF does not parse, or not to its end. Python's warnings are no business of threads: call it in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            Image.Exif().load(exif)
        except Exception:  # as below
            return True
    return False


def read_image(data: bytes, at_least_hw_px: tuple[int, int] | None = None) -> Pixels:
    """Decode to uint8 [H, W, 3]: first frame, orientation applied, transparency on white, deep samples cut to 8 bits.

    With at_least_hw_px a JPEG may be decoded at a fraction of its size (in the DCT), never below that size.
    Errors: DataError when it does not decode.
    """
    try:
        pixels = _read_jpeg(data, at_least_hw_px or (0, 0)) if data.startswith(_JPEG_MARK) else None
        return upright_pixels(open_image(data)) if pixels is None else pixels
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"does not decode: {error}") from error


def read_image_at(data: Encoded, size_hw_px: tuple[int, int], view: View = PLAIN) -> Tensor:
    """Decode and resize, bilinear and antialiased, to uint8 [3, height, width], as a view shows the image.

    Errors: DataError when it does not decode.
    """
    height_px, width_px = size_hw_px
    least = decode_size(height_px / view.side, width_px / view.side)
    pixels = view.cut(read_image(data, least) if isinstance(data, bytes) else data.pixels(least))
    image = rearrange(torch.from_numpy(pixels), "h w c -> c h w")
    return view.finish(resize_to_grid(image, size_hw_px, patch_size=1))


def decode_patches(data: Encoded, grid_hw: tuple[int, int], patch_size_px: int, view: View = PLAIN) -> Tensor:
    """Decode, resize to a grid of patches and cut, as the student sees an image: uint8 [n, 3 * P * P].

    Patches go row by row, each channel-major like a flat Conv2d weight.
    Errors: DataError when it does not decode.
    """
    size_hw_px = (grid_hw[0] * patch_size_px, grid_hw[1] * patch_size_px)
    return patchify(read_image_at(data, size_hw_px, view), patch_size_px)


def _read_jpeg(data: bytes, at_least_hw_px: tuple[int, int]) -> Pixels | None:
    """Decode a JPEG with simplejpeg; None where it gives up (CMYK, oddities), which Pillow may still read."""
    orientation = orientation_of(open_image(data)) if _EXIF_MARK in data else 1
    min_height, min_width = at_least_hw_px if orientation < 5 else at_least_hw_px[::-1]
    try:
        height_px, width_px, _, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(height_px, width_px)
        smallest = halvings((height_px, width_px), (min_height, min_width)) if min_height and min_width else 0
        pixels = simplejpeg.decode_jpeg(data, min_height=height_px >> smallest, min_width=width_px >> smallest)
    except ValueError:
        return None
    return turn_upright(pixels, orientation)
