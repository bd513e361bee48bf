"""Decoding: right pixels from every kind of image, DataError from everything else."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image, ImageOps

from cogvit.errors import DataError
from data_pipeline.augment import AS_IT_IS, PLAIN, Augmentation, View, views_of
from data_pipeline.decode import Header, decode_patches, read_header, read_image, read_image_at
from tests.data.corpus import picture

ROOT = Path(__file__).parents[2]


def encoded(image, image_format, **options):
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def pixels_of(image_CHW):
    return image_CHW.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_pillow(image_format):
    data = picture(30, 44, 1, image_format)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    pixels = read_image(data)
    assert pixels.shape[:2] == (30, 44)
    assert read_header(data) == Header(30, 44, image_format.lower())
    assert np.abs(pixels.astype(int) - reference).max() <= 2


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_size_and_pixels(image_format, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = picture(32, 48, 2, image_format, exif=exif.tobytes())
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    header = read_header(data)
    assert (header.height_px, header.width_px) == upright.shape[:2]
    assert np.abs(read_image(data).astype(int) - upright).max() <= 2
    assert read_image(data, (2, 2)).shape[0] * upright.shape[1] == read_image(data, (2, 2)).shape[1] * upright.shape[0]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\xff", "9", "0"])
def test_damaged_exif_turns_nothing(exif):
    if not isinstance(exif, bytes):
        tag, orientation = Image.Exif(), int(exif)
        tag[0x112] = orientation
        exif = tag.tobytes()
    data = picture(32, 48, 2, "JPEG", exif=exif)
    assert read_header(data) == Header(32, 48, "jpeg")
    assert np.array_equal(read_image(data), read_image(picture(32, 48, 2, "JPEG")))


def test_formats_that_other_programs_decode_are_none():
    """Pillow hands EPS to Ghostscript, whatever its file is called."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for read in (read_header, read_image):
        with pytest.raises(DataError, match="no known image format"):
            read(eps)


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    pixels = read_image(encoded(image, "PNG"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [10, 20, 30]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert read_image(encoded(palette, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P"])
def test_other_color_modes_become_rgb(mode):
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    pixels = read_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (16, 16, 3)
    assert pixels.min() >= 250


def test_16_bit_gray_keeps_its_range():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    pixels = read_image(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels[..., 0], (ramp // 257).astype(np.uint8))


@pytest.mark.filterwarnings("error")
def test_floats_are_cut_to_their_range():
    samples = np.array([[0.5, 2.0, np.inf], [-1.0, np.nan, -np.inf]], np.float32)
    assert read_image(encoded(Image.fromarray(samples), "TIFF"))[..., 0].tolist() == [[128, 255, 255], [0, 0, 0]]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(data)[0, 0].tolist() == [255, 0, 0]


def bomb():
    """A valid PNG header of 30,000 x 30,000 with hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        picture(64, 64, 3, "JPEG")[:300],
        picture(64, 64, 3, "PNG")[:90],
        b"\xff\xd8\xff\xe0",
        bomb(),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "jpeg magic alone", "bomb"],
)
def test_foreign_bytes_are_a_data_error(data):
    with pytest.raises(DataError):
        read_image(data)


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(DataError, match="pixel"):
        read_header(bomb())


def test_resized_image_follows_the_antialiased_reference():
    data = picture(90, 60, 4)
    reference = Image.open(io.BytesIO(data)).convert("RGB").resize((20, 30), Image.Resampling.BILINEAR)
    assert np.abs(pixels_of(read_image_at(data, (30, 20))) - np.asarray(reference)).max() <= 2


def test_jpeg_at_a_fraction_stays_close_to_the_full_decode():
    data = picture(400, 640, 5, "JPEG", quality=95)
    whole = Image.fromarray(read_image(data)).resize((80, 50), Image.Resampling.BILINEAR)
    assert read_image(data, (100, 160)).shape == (100, 160, 3)
    assert np.abs(pixels_of(read_image_at(data, (50, 80))) - np.asarray(whole)).max() <= 4


def test_patches_lie_as_a_flat_convolution_weight():
    data = picture(24, 16, 6)
    patches = decode_patches(data, (3, 2), 8)
    expected = rearrange(read_image(data), "(r p) (s q) c -> (r s) (c p q)", p=8, q=8)
    assert patches.dtype == torch.uint8
    assert np.array_equal(patches.numpy(), expected)
    weight_DCPQ = torch.randn(5, 3, 8, 8)
    image_1CHW = torch.from_numpy(read_image(data)).permute(2, 0, 1)[None].float()
    convolved = torch.nn.functional.conv2d(image_1CHW, weight_DCPQ, stride=8).flatten(2)[0].T
    torch.testing.assert_close(patches.float() @ weight_DCPQ.flatten(1).T, convolved, rtol=1e-4, atol=1e-2)


def test_views_are_drawn_as_asked():
    keys = np.arange(4000)
    assert views_of(keys, AS_IT_IS) == [PLAIN] * 4000
    assert 1850 < sum(view.mirrored for view in views_of(keys, Augmentation(flip=True))) < 2150
    views = views_of(keys, Augmentation(crop=0.25))
    area = np.array([view.side**2 for view in views])
    assert 0.25 <= area.min() < 0.26 and 0.99 < area.max() <= 1.0
    assert abs(area.mean() - 0.625) < 0.02  # uniform
    for place in ("top", "left"):
        free = np.array([getattr(view, place) / (1.0 - view.side) for view in views])
        assert free.min() >= 0.0 and free.max() <= 1.0 and abs(free.mean() - 0.5) < 0.02
    factors = np.array([view.color for view in views_of(keys, Augmentation(color=0.4))])
    assert factors.min() > 0.599 and factors.max() < 1.401
    drawn = np.stack([area, *factors.T, *np.array([(view.top, view.left) for view in views]).T])
    correlation = np.corrcoef(drawn)
    assert np.abs(correlation[1:4, 1:4] - np.eye(3)).max() < 0.06  # each factor is a draw of its own
    assert abs(correlation[4, 5]) < 0.6  # places share the room that the area leaves, and nothing else
    assert {view.mirrored for view in views} == {False} and {view.color for view in views} == {(1.0, 1.0, 1.0)}


def test_a_view_mirrors_cuts_and_recolors():
    data = picture(8, 8, 7)
    expected = rearrange(read_image(data)[:, ::-1], "(r p) (s q) c -> (r s) (c p q)", p=4, q=4)
    assert np.array_equal(decode_patches(data, (2, 2), 4, View(mirrored=True)).numpy(), expected)
    data = picture(40, 60, 8)
    part = read_image(data)[10:30, 15:45]
    assert np.array_equal(pixels_of(read_image_at(data, (20, 30), View(top=0.25, left=0.25, side=0.5))), part)
    whole = pixels_of(read_image_at(data, (20, 30)))
    gray = (whole @ np.array([0.299, 0.587, 0.114]))[..., None]
    for color, wanted in (
        ((1.2, 1.0, 1.0), whole * 1.2),
        ((1.0, 0.7, 1.0), (whole - 127.5) * 0.7 + 127.5),
        ((1.0, 1.0, 0.5), gray + 0.5 * (whole - gray)),
    ):
        seen = pixels_of(read_image_at(data, (20, 30), View(color=color)))
        assert np.abs(seen - np.clip(wanted, 0, 255)).max() <= 1


@pytest.mark.parametrize("size_px", [(1, 1), (1, 50), (3, 2)])
def test_a_crop_of_few_pixels_keeps_one(size_px):
    for view in views_of(np.arange(50), Augmentation(crop=0.01)):
        assert read_image_at(picture(*size_px, 9), (4, 4), view).shape == (3, 4, 4)


def test_a_crop_of_a_jpeg_shows_the_same_part_at_any_size():
    """Teachers decode at other sizes, and so at other fractions of a JPEG, than the student."""
    data = picture(800, 640, 5, "JPEG", quality=95)
    for view in views_of(np.arange(10), Augmentation(flip=True, crop=0.2, color=0.3)):
        small, large = (pixels_of(read_image_at(data, size, view)) for size in ((50, 40), (400, 320)))
        shrunk = np.asarray(Image.fromarray(large.astype(np.uint8)).resize((40, 50), Image.Resampling.BILINEAR))
        assert np.abs(small - shrunk).max() <= 6


@pytest.mark.parametrize(
    ("image_format", "options", "named"),
    [("MPO", {}, "jpeg"), ("AVIF", {"quality": 90}, "avif"), ("JPEG2000", {}, "jpeg2000")],
)
def test_what_phones_and_archives_write_is_read(image_format, options, named):
    data = picture(24, 40, seed=1, image_format=image_format, **options)
    header = read_header(data)
    assert (header.height_px, header.width_px, header.format) == (24, 40, named)
    plain = read_image(picture(24, 40, seed=1))
    assert np.abs(read_image(data).astype(int) - plain.astype(int)).mean() < 12


def test_damaged_exif_is_quiet(capfd):
    """In a process of its own: pytest shows warnings in its own way."""
    code = (
        "import io, sys; from PIL import Image; from data_pipeline.decode import read_header; data = io.BytesIO();"
        "exif = b'Exif\\0\\0II*\\0\\x08\\0\\0\\0\\xff\\xff\\x12\\x01';"
        "Image.new('RGB', (8, 8)).save(data, 'JPEG', exif=exif); read_header(data.getvalue())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
