"""Boxes as text, as CogVLM was taught to write them: [[x0,y0,x1,y1]], thousandths of the image in three digits.

Several boxes of one phrase stand behind semicolons: [[x0,y0,x1,y1;x0,y0,x1,y1]].

Source: CogVLM (arXiv 2311.03079), section 2.3; `boxstr_to_boxes` of its grounding parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from cogvit.errors import DataError

_STEPS, _LAST = 1000, 999
_NUMBER = r"\d{1,3}"
_ONE = rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}"
_GROUP = re.compile(rf"\[\[({_ONE}(?:;{_ONE})*)\]\]")


class Box(NamedTuple):
    """Left, top, right and bottom, px."""

    x0: float
    y0: float
    x1: float
    y1: float


def boxes_text(boxes: Sequence[Box], height_px: int, width_px: int) -> str:
    """Return boxes of an image as text.

    Errors: DataError when there is none, or one is empty or lies outside the image.
    """
    if not boxes:
        raise DataError("there is no box to write; leave the phrase without one")
    written = []
    for box in boxes:
        if not (0 <= box.x0 < box.x1 <= width_px and 0 <= box.y0 < box.y1 <= height_px):
            raise DataError(
                f"the box {tuple(box)} is empty or outside of its image of {height_px} x {width_px} px; expected"
                f" x0 < x1 up to {width_px} and y0 < y1 up to {height_px}"
            )
        sides = (width_px, height_px, width_px, height_px)
        steps = (min(int(value * _STEPS / side), _LAST) for value, side in zip(box, sides, strict=True))
        written.append(",".join(f"{step:03}" for step in steps))
    return f"[[{';'.join(written)}]]"


def read_boxes(text: str, height_px: int, width_px: int) -> list[Box]:
    """Return the boxes that an answer names, in its order; what is no box is passed over.

    A model may name corners in the wrong order: they are sorted, so that a box is never turned inside out.
    """
    found = []
    for group in _GROUP.findall(text):
        for one in group.split(";"):
            x, y, right, bottom = (int(number) / _STEPS for number in one.split(","))
            (x0, x1), (y0, y1) = sorted((x, right)), sorted((y, bottom))
            found.append(Box(x0 * width_px, y0 * height_px, x1 * width_px, y1 * height_px))
    return found


def intersection_over_union(a: Box, b: Box) -> float:
    """Return the common area over the whole; 0 where both are empty."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    common = max(width, 0.0) * max(height, 0.0)
    whole = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b)) - common
    return common / whole if whole > 0.0 else 0.0


def box_accuracy(answers: Sequence[Sequence[Box]], truths: Sequence[Box], threshold: float = 0.5) -> float:
    """Return the share of questions whose first box overlaps the true one by the threshold or more.

    Args:
        answers: boxes of each answer; one without counts as wrong.
        truths: the box of each question.
        threshold: of intersection over union.

    Errors: ValueError when there is no question, or answers and truths are not as many.
    """
    if not truths or len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers for {len(truths)} boxes; expected as many, at least one")
    right = [
        bool(boxes) and intersection_over_union(boxes[0], truth) >= threshold
        for boxes, truth in zip(answers, truths, strict=True)
    ]
    return sum(right) / len(right)
