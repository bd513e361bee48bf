"""The pictograms of the Noto Emoji font, drawn in named colors, with their English and Chinese names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import emoji
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from tools.demo_corpus.sample import Sample

SOURCE = "pictograms"
FONT_FILE = "NotoEmoji[wght].ttf"
_FONT = files("manimgx_fonts") / FONT_FILE
_PATCH_PX = 8
_GRIDS = ((4, 5), (5, 4), (5, 5), (4, 6), (6, 4), (5, 6), (6, 5))  # rows, columns: 20 to 30 patches
_WEIGHTS = (400, 500, 600, 700)  # of the font's one axis
_BACKGROUND = (200, 256)  # of each color channel
_INK_JITTER = 20  # of each color channel
_SIZE = (0.65, 0.8)  # of the font, as a share of the shorter side of the canvas
_SHIFT_PX = 4  # from the center of the canvas


@dataclass(frozen=True, slots=True)
class Color:
    """A color a pictogram is drawn in; all stand out from a light background."""

    en: str
    zh: str
    rgb: tuple[int, int, int]


COLORS = (
    Color("red", "红色的", (215, 30, 30)),
    Color("orange", "橙色的", (240, 130, 10)),
    Color("green", "绿色的", (25, 145, 45)),
    Color("blue", "蓝色的", (35, 60, 215)),
    Color("purple", "紫色的", (140, 35, 165)),
    Color("black", "黑色的", (20, 20, 20)),
)


@dataclass(frozen=True, slots=True)
class Pictogram:
    """One glyph of the font and what it is called."""

    character: str
    name_en: str
    name_zh: str


@cache
def pictograms() -> tuple[Pictogram, ...]:
    """All pictograms of one code point that the font draws and that have both names, by code point."""
    with _FONT.open("rb") as file:
        drawn = TTFont(file, lazy=True).getBestCmap()
    emoji.config.load_language("zh")
    found = []
    for sequence, names in emoji.EMOJI_DATA.items():
        character = sequence.replace("\ufe0f", "")  # the variation selector that asks for the colored form
        qualified = names["status"] == emoji.STATUS["fully_qualified"] and "zh" in names
        if qualified and len(character) == 1 and ord(character) in drawn:
            found.append(Pictogram(character, _plain(names["en"]), _plain(names["zh"])))
    return tuple(sorted(found, key=lambda pictogram: ord(pictogram.character)))


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ")


@cache
def _font(size_px: int, weight: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(str(_FONT), size_px)
    font.set_variation_by_axes([weight])
    return font


def drawing(pictogram: Pictogram, seed: int, number: int) -> Sample:
    """Draw a pictogram with the canvas, size, weight, position, color and background that seed and number give it."""
    code = ord(pictogram.character)
    rng = np.random.default_rng((seed, number, code))
    rows, columns = _GRIDS[rng.integers(len(_GRIDS))]
    width_px, height_px = columns * _PATCH_PX, rows * _PATCH_PX
    color = COLORS[rng.integers(len(COLORS))]
    ink = tuple(np.clip(color.rgb + rng.integers(-_INK_JITTER, _INK_JITTER + 1, 3), 0, 255).tolist())
    image = Image.new("RGB", (width_px, height_px), tuple(rng.integers(*_BACKGROUND, 3).tolist()))
    font = _font(round(min(width_px, height_px) * rng.uniform(*_SIZE)), _WEIGHTS[rng.integers(len(_WEIGHTS))])
    center = np.array([width_px, height_px]) / 2 + rng.uniform(-_SHIFT_PX, _SHIFT_PX, 2)
    ImageDraw.Draw(image).text(tuple(center.round().tolist()), pictogram.character, fill=ink, font=font, anchor="mm")
    captions = f"a {color.en} {pictogram.name_en}", f"{color.zh}{pictogram.name_zh}"
    return Sample(f"{code:05x}_{number:02d}", image, "png", SOURCE, *captions)


def drawings(seed: int, number: int) -> Iterator[Sample]:
    """Drawing `number` of every pictogram, in an order of its own."""
    order = np.random.default_rng((seed, number)).permutation(len(pictograms()))
    return (drawing(pictograms()[i], seed, number) for i in order)
