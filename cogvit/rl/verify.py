"""What answers are worth, from 0 to 1: rules that need nothing but the answer and the truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cogvit.model.boxes import Box, intersection_over_union, read_boxes

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Cell = tuple[int, int]  # row and column, from 0
_POINT = re.compile(r"\[\[(\d{1,3}),(\d{1,3})\]\]")
_CELL = re.compile(r"^([a-z]+) (\d) (\d)$")
_STEPS = 1000  # of a side, as boxes count


def exact(answer: str, truth: str) -> float:
    """Return 1 for the same words, whatever their case and the period behind them."""
    return float(_plain(answer) == _plain(truth))


def number(answer: str, truth: int) -> float:
    """Return 1 where the answer's only number, in digits or as a word to nine, is the true one."""
    words = re.findall(r"\d+|[a-z]+", answer.lower())
    named = [int(word) if word.isdigit() else NUMBER_WORDS.index(word) for word in words if _is_number(word)]
    return float(named == [truth])


def spelling(answer: str, truth: str) -> float:
    """Return 1 less the share of the longer text's characters that must be changed, put in or left out.

    White space and periods around the answer do not count.
    """
    answer = answer.strip(" \t\n.")
    longest = max(len(answer), len(truth))
    return 1.0 - _edits(answer, truth) / longest if longest else 1.0


def overlap(answer: str, truth: Box, height_px: int, width_px: int) -> float:
    """Return the intersection over union of the answer's first box; 0 without one."""
    boxes = read_boxes(answer, height_px, width_px)
    return intersection_over_union(boxes[0], truth) if boxes else 0.0


def hit(answer: str, target: Box, height_px: int, width_px: int) -> float:
    """Return 1 where the answer's first point, [[x,y]] in thousandths of the image, lies in the target."""
    point = _POINT.search(answer)
    if point is None:
        return 0.0
    x, y = int(point[1]) / _STEPS * width_px, int(point[2]) / _STEPS * height_px
    return float(target.x0 <= x <= target.x1 and target.y0 <= y <= target.y1)


def painted(answer: str, truth: Mapping[Cell, str], colors: Sequence[str], side: int) -> float:
    """Return the share of painted cells that the answer's program and the truth paint alike.

    A program is commands like `red 0 3`, a color with a row and a column, with semicolons between; one that cannot be
    read is worth 0.
    """
    cells: dict[Cell, str] = {}
    for command in filter(None, (part.strip() for part in answer.lower().split(";"))):
        read = _CELL.match(command)
        if read is None or read[1] not in colors or int(read[2]) >= side or int(read[3]) >= side:
            return 0.0
        cells[int(read[2]), int(read[3])] = read[1]
    alike = sum(cells.get(cell) == color for cell, color in truth.items())
    return alike / max(len(cells.keys() | truth.keys()), 1)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")


def _is_number(word: str) -> bool:
    return word.isdigit() or word in NUMBER_WORDS


def _edits(a: str, b: str) -> int:
    """The Levenshtein distance."""
    above = list(range(len(b) + 1))
    for row, character in enumerate(a, 1):
        here = [row]
        for column, other in enumerate(b, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (character != other)))
        above = here
    return above[-1]
