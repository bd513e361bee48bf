"""CIDEr-D: how much of what a caption says is what people say of the image, and of few others.

Source: Vedantam et al. 2015 (arXiv 1411.5726), with the clipping and the length penalty of its D variant.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty on another length, in words
_SCALE = 10.0  # as it is told everywhere
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+(?:'[^\W_]+)?")  # a Chinese or Japanese character is a word

Grams = Counter[tuple[str, ...]]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean score of answers, each beside the references of its image; 0 to 10, above where words are rare.

    How rare a phrase is, the references themselves say: one image teaches nothing, and gives 0.
    """
    said = [[_grams(text) for text in own] for own in references]
    shown = Counter(gram for own in said for gram in {gram for text in own for gram in text})
    known = math.log(max(len(references), 1))
    scores = []
    for answer, own in zip(answers, said, strict=True):
        grams = _grams(answer)
        scores.append(sum(_likeness(grams, other, shown, known) for other in own) / len(own))
    return _SCALE * sum(scores) / len(scores) if scores else 0.0


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, without marks."""
    return tuple(_WORD.findall(text.lower()))


def _grams(text: str) -> Grams:
    said = words(text)
    return Counter(said[start : start + n] for n in range(1, _LONGEST + 1) for start in range(len(said) - n + 1))


def _likeness(one: Grams, other: Grams, shown: Counter[tuple[str, ...]], known: float) -> float:
    """The mean over n of the clipped cosine of both texts' phrases of n words, weighted by how rare they are."""

    def weighed(grams: Grams, n: int) -> dict[tuple[str, ...], float]:
        chosen = ((gram, count) for gram, count in grams.items() if len(gram) == n)
        return {gram: count * (known - math.log(max(shown[gram], 1))) for gram, count in chosen}

    apart = _length(one) - _length(other)
    total = 0.0
    for n in range(1, _LONGEST + 1):
        a, b = weighed(one, n), weighed(other, n)
        lengths = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
        if lengths > 0.0:
            total += sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / lengths
    return total / _LONGEST * math.exp(-(apart**2) / (2 * _SIGMA**2))


def _length(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)
