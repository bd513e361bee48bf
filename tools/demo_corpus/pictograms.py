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
_GRIDS = ((4, 5), (5, 4), (5, 5), (4, 6), (6, 4), (5, 6), (6, 5), (4, 7), (7, 4))  # rows, columns: 20 to 30 patches
_WEIGHTS = (300, 400, 500, 600, 700)  # of the font's one axis
_SHADES = {"light": (190, 256), "dark": (0, 66)}
_JITTER = 20  # of each color channel, out of 255


@dataclass(frozen=True, slots=True)
class Color:
    """A color a pictogram is drawn in, with the backgrounds it stands out from."""

    en: str
    zh: str
    rgb: tuple[int, int, int]
    backgrounds: tuple[str, ...]


COLORS = (
    Color("red", "红色的", (215, 35, 35), ("light", "dark")),
    Color("orange", "橙色的", (240, 135, 10), ("light", "dark")),
    Color("yellow", "黄色的", (235, 220, 40), ("dark",)),
    Color("green", "绿色的", (25, 150, 50), ("light", "dark")),
    Color("blue", "蓝色的", (35, 65, 215), ("light",)),
    Color("purple", "紫色的", (140, 40, 170), ("light",)),
    Color("black", "黑色的", (20, 20, 20), ("light",)),
    Color("white", "白色的", (235, 235, 235), ("dark",)),
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
        if names["status"] == emoji.STATUS["fully_qualified"] and len(character) == 1 and ord(character) in drawn:
            if "zh" in names:
                found.append(Pictogram(character, _plain(names["en"]), _plain(names["zh"])))
    return tuple(sorted(found, key=lambda pictogram: ord(pictogram.character)))


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ")


@cache
def _font(size_px: int, weight: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(str(_FONT), size_px)
    font.set_variation_by_axes([weight])
    return font


def draw(pictogram: Pictogram, key: str, rng: np.random.Generator) -> Sample:
    """Draw a pictogram with random canvas, size, weight, position, color and background."""
    rows, columns = _GRIDS[rng.integers(len(_GRIDS))]
    color = COLORS[rng.integers(len(COLORS))]
    low, high = _SHADES[color.backgrounds[rng.integers(len(color.backgrounds))]]
    background = tuple(rng.integers(low, high, 3).tolist())
    ink = tuple(np.clip(color.rgb + rng.integers(-_JITTER, _JITTER + 1, 3), 0, 255).tolist())
    width_px, height_px = columns * _PATCH_PX, rows * _PATCH_PX
    font = _font(round(min(width_px, height_px) * rng.uniform(0.6, 0.8)), _WEIGHTS[rng.integers(len(_WEIGHTS))])
    left, top, right, bottom = font.getbbox(pictogram.character)
    x = rng.uniform(*_slack(right - left, width_px)) - left
    y = rng.uniform(*_slack(bottom - top, height_px)) - top
    image = Image.new("RGB", (width_px, height_px), background)
    ImageDraw.Draw(image).text((round(x), round(y)), pictogram.character, fill=ink, font=font)
    return Sample(
        key, image, "png", SOURCE, f"a {color.en} {pictogram.name_en}", f"{color.zh}{pictogram.name_zh}"
    )


def _slack(extent_px: float, canvas_px: int) -> tuple[float, float]:
    """Where an extent may begin so that it stays on the canvas, or is cut by the same share on both sides."""
    begin = canvas_px - extent_px
    return min(begin, 0.0), max(begin, 0.0)


def drawings(seed: int, number: int) -> Iterator[Sample]:
    """Drawing `number` of every pictogram, in an order of its own; each depends on seed, number and code point only."""
    order = np.random.default_rng((seed, number)).permutation(len(pictograms()))
    for pictogram in (pictograms()[i] for i in order):
        code = ord(pictogram.character)
        yield draw(pictogram, f"{code:05x}_{number:02d}", np.random.default_rng((seed, number, code)))
