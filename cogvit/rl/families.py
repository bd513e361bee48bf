"""Six families of tasks on drawn pictures: each picture, question and truth is a function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvit.model.boxes import Box
from cogvit.model.chat import Message
from cogvit.rl import verify

SIDE_PX = 48
COLORS = {
    "red": (215, 30, 30),
    "orange": (240, 130, 10),
    "green": (25, 145, 45),
    "blue": (35, 60, 215),
    "purple": (140, 35, 165),
    "black": (20, 20, 20),
}
_PAPER = (245, 245, 240)
_LETTERS = "ABCDEFGHKLNPRSTUVXYZ"  # that no other is taken for, narrower than their pitch
_GRID = 4
_PITCH_PX = 16  # of characters
_STEP_PX = 4  # glyphs stand at multiples of it: at any pixel a small model needs many times the pictures


def ask(image: Image.Image, question: str) -> list[Message]:
    """Return a question about a picture."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


class Digits:
    """Which digit is it?"""

    source = "digits"

    def reset(self, seed: int) -> Sequence[Message]:
        """Draw one digit somewhere."""
        rng = _draws(self.source, seed)
        self.truth = int(rng.integers(10))
        return ask(_written(str(self.truth), rng, size_px=int(rng.integers(26, 38))), "Which digit is it?")

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """Right or wrong."""
        return verify.number(answer, self.truth)


class Counting:
    """How many dots are there?"""

    source = "counting"

    def reset(self, seed: int) -> Sequence[Message]:
        """Draw one to five dots in cells of a grid."""
        rng = _draws(self.source, seed)
        self.truth, (image, draw) = int(rng.integers(1, 6)), _canvas()
        ink = _color(rng)[1]
        for cell in rng.permutation(9)[: self.truth].tolist():
            draw.ellipse(_inner(cell // 3, cell % 3, 3, 4), fill=ink)
        return ask(image, "How many dots are there?")

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """Right or wrong."""
        return verify.number(answer, self.truth)


class Reading:
    """What is written here?"""

    source = "reading"

    def reset(self, seed: int) -> Sequence[Message]:
        """Write two or three letters."""
        rng = _draws(self.source, seed)
        self.truth = "".join(rng.choice(list(_LETTERS), int(rng.integers(2, 4))).tolist())
        return ask(_written(self.truth, rng, size_px=int(rng.integers(17, 20))), "What is written here?")

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """By the letters that are wrong."""
        return verify.spelling(answer, self.truth)


class Grounding:
    """Where is the thing of a color?"""

    source = "grounding"

    def reset(self, seed: int) -> Sequence[Message]:
        """Draw two rectangles that do not touch, of two colors."""
        rng = _draws(self.source, seed)
        image, draw = _canvas()
        names = rng.permutation(list(COLORS))[:2].tolist()
        for side, name in zip(rng.permutation(2).tolist(), names, strict=True):
            left, top = side * SIDE_PX // 2 + int(rng.integers(2, 8)), int(rng.integers(2, 20))
            box = Box(left, top, left + int(rng.integers(9, 15)), top + int(rng.integers(10, 26)))
            draw.rectangle((box.x0, box.y0, box.x1 - 1, box.y1 - 1), fill=COLORS[name])
            self.truth = box  # of the last one
        return ask(image, f"Where is the {names[-1]} box?")

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """By intersection over union."""
        return verify.overlap(answer, self.truth, SIDE_PX, SIDE_PX)


class Drawing:
    """Which program draws this?"""

    source = "drawing"

    def reset(self, seed: int) -> Sequence[Message]:
        """Paint one to three cells of a grid."""
        rng = _draws(self.source, seed)
        image, draw = _canvas()
        cells = rng.permutation(_GRID * _GRID)[: int(rng.integers(1, 4))].tolist()
        self.truth = {(cell // _GRID, cell % _GRID): _color(rng)[0] for cell in cells}
        for (row, column), name in self.truth.items():
            draw.rectangle(_inner(row, column, _GRID, 1), fill=COLORS[name])
        return ask(image, "Which program draws this?")

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """By the cells that are painted alike."""
        return verify.painted(answer, self.truth, list(COLORS), _GRID)


class Clicking:
    """A screen of two steps: click one button, and on the next screen another; a miss ends it."""

    source = "clicking"

    def reset(self, seed: int) -> Sequence[Message]:
        """Show the first screen."""
        self.hits, self._rng = 0, _draws(self.source, seed)
        return self._screen()

    def step(self, text: str) -> Sequence[Message] | None:
        """Show the second screen after a hit on the first."""
        if self.hits or not verify.hit(text, self.target, SIDE_PX, SIDE_PX):
            return None
        self.hits = 1
        return self._screen()

    def verify(self, answer: str) -> float:
        """Half for each button that was hit."""
        return 0.5 * (self.hits + verify.hit(answer, self.target, SIDE_PX, SIDE_PX)) if self.hits else 0.0

    def _screen(self) -> Sequence[Message]:
        image, draw = _canvas()
        names = self._rng.permutation(list(COLORS))[:3].tolist()
        cells = self._rng.permutation(9)[:3].tolist()
        for cell, name in zip(cells, names, strict=True):
            box = _inner(cell // 3, cell % 3, 3, 2)
            draw.rectangle(box, fill=COLORS[name])
            self.target = Box(*box)
        return ask(image, f"Click the {names[-1]} button.")


FAMILIES: dict[str, Any] = {task.source: task for task in (Digits, Counting, Reading, Grounding, Drawing, Clicking)}


def _draws(source: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([*source.encode(), seed])


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), _PAPER)
    return image, ImageDraw.Draw(image)


def _color(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    name = str(rng.choice(list(COLORS)))
    return name, COLORS[name]


def _inner(row: int, column: int, per_side: int, margin_px: int) -> tuple[int, int, int, int]:
    """A cell of a grid over the whole canvas without its margin, px: left, top, right, bottom."""
    cell_px = SIDE_PX // per_side
    left, top = column * cell_px + margin_px, row * cell_px + margin_px
    return left, top, left + cell_px - 2 * margin_px - 1, top + cell_px - 2 * margin_px - 1


@cache
def _font(size_px: int) -> Any:
    return ImageFont.load_default(size_px)


def _written(text: str, rng: np.random.Generator, *, size_px: int) -> Image.Image:
    """A text whose ink lies whole inside the canvas, somewhere: characters of one pitch, at steps of a grid."""
    image, draw = _canvas()
    boxes = [draw.textbbox((0, 0), character, font=_font(size_px)) for character in text]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    wide, high = _PITCH_PX * (len(text) - 1) + int(boxes[-1][2] - boxes[-1][0]), int(bottom - top)
    x, y = (1 + _STEP_PX * int(rng.integers((SIDE_PX - 2 - size) // _STEP_PX + 1)) for size in (wide, high))
    ink = _color(rng)[1]
    for place, (character, box) in enumerate(zip(text, boxes, strict=True)):
        draw.text((x + place * _PITCH_PX - box[0], y - top), character, font=_font(size_px), fill=ink)
    return image
