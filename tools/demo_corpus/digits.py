"""The 1,797 handwritten digits that come with scikit-learn, with captions that name them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tools.demo_corpus.sample import Sample

SOURCE = "digits"
NAMES_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES_ZH = "零一二三四五六七八九"
NUM_HELDOUT = 400
_CANVASES_PX = ((40, 40), (40, 32), (48, 40))  # width, height
_LARGEST_INK = 16.0  # of the 8 x 8 images


def draw(ink: np.ndarray, digit: int, key: str, rng: np.random.Generator) -> Sample:
    """Draw an 8 x 8 digit, dark on light, at a random size and position."""
    width_px, height_px = _CANVASES_PX[rng.integers(len(_CANVASES_PX))]
    side_px = int(rng.integers(28, min(width_px, height_px) + 1))
    paper, pen = int(rng.integers(215, 256)), int(rng.integers(0, 50))
    glyph = Image.fromarray((paper + (pen - paper) * (ink / _LARGEST_INK)).astype(np.uint8))
    x, y = int(rng.integers(width_px - side_px + 1)), int(rng.integers(height_px - side_px + 1))
    image = Image.new("L", (width_px, height_px), paper)
    image.paste(glyph.resize((side_px, side_px), Image.Resampling.BICUBIC), (x, y))
    captions = f"the digit {NAMES_EN[digit]}", f"数字{NAMES_ZH[digit]}"
    return Sample(key, image.convert("RGB"), "png", SOURCE, *captions, label=digit)


def drawings(seed: int, number: int, numbers_of_digits: np.ndarray) -> Iterator[Sample]:
    """Drawing `number` of each of the given digits, in the given order."""
    data = load_digits()
    for i in numbers_of_digits:
        rng = np.random.default_rng((seed, number, i))
        yield draw(data.images[i], int(data.target[i]), f"{i:04d}_{number:02d}", rng)


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the digits and return which are for training and which are held out."""
    order = np.random.default_rng(seed).permutation(len(load_digits().images))
    return order[NUM_HELDOUT:], order[:NUM_HELDOUT]
