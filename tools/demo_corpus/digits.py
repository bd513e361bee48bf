"""The 1,797 handwritten digits that come with scikit-learn, with captions that name them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tools.demo_corpus.sample import Sample

SOURCE = "digits"
NAMES_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES_ZH = "零一二三四五六七八九"
NUM_HELDOUT = 400
_CANVAS_PX = 40
_SMALLEST_PX = 34
_MOST_INK = 16.0


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Return the ink, [1797, 8, 8] from 0 to 16, and which digit each image is."""
    data = load_digits()
    return data.images, data.target


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which digits are for training and which are held out, each in random order."""
    order = np.random.default_rng(seed).permutation(len(_handwriting()[0]))
    return order[NUM_HELDOUT:], order[:NUM_HELDOUT]


def drawing(index: int, seed: int, number: int) -> Sample:
    """Draw a digit, dark on light, with the size, place and shades that seed and number give it."""
    images, targets = _handwriting()
    rng = np.random.default_rng((seed, number, index))
    side_px = int(rng.integers(_SMALLEST_PX, _CANVAS_PX + 1))
    paper, pen = int(rng.integers(225, 256)), int(rng.integers(0, 40))
    shades = paper + (pen - paper) * (images[index] / _MOST_INK)
    glyph = Image.fromarray(shades.astype(np.uint8)).resize((side_px, side_px), Image.Resampling.BICUBIC)
    image = Image.new("L", (_CANVAS_PX, _CANVAS_PX), paper)
    image.paste(glyph, tuple(rng.integers(0, _CANVAS_PX - side_px + 1, 2).tolist()))
    digit = int(targets[index])
    captions = f"the digit {NAMES_EN[digit]}", f"数字{NAMES_ZH[digit]}"
    return Sample(f"{index:04d}_{number:02d}", image.convert("RGB"), "png", SOURCE, *captions, label=digit)


def drawings(seed: int, number: int, indices: np.ndarray) -> Iterator[Sample]:
    """Drawing `number` of each of the given digits."""
    return (drawing(int(index), seed, number) for index in indices)
