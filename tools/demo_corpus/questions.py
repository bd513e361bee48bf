"""Questions about the pictures of the demo, with their answers: conversations of one turn each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tools.demo_corpus.sample import Sample

SOURCE = "questions"
COLOR, DIGIT = "What color is it?", "Which digit is it?"


def of_pictograms(drawings: Iterable[Sample]) -> Iterator[Sample]:
    """Ask for the color of pictograms: the second word of their captions."""
    for drawing in drawings:
        yield replace(drawing, source=SOURCE, question=COLOR, caption_en=drawing.caption_en.split()[1])


def of_digits(drawings: Iterable[Sample]) -> Iterator[Sample]:
    """Ask which digit is shown: the last word of its caption."""
    for drawing in drawings:
        yield replace(drawing, source=SOURCE, question=DIGIT, caption_en=drawing.caption_en.split()[-1], label=None)
