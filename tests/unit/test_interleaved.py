"""The texts of the experiment on heads for more tokens: what is learned of them, and where a prediction stands."""

from __future__ import annotations

import torch

from cogvit.model.config import MmtpConfig
from tools.experiments.heads import places_of
from tools.experiments.interleaved import Laid, Pictures, Words, lay

WORDS = Words(begin=1, image=2, end=3)
PICTURES = Pictures([torch.zeros(4, 5), torch.ones(2, 5)], [(2, 2), (1, 2)], [[10, 11, 0], [12, 0]])


def laid() -> Laid:
    return lay(PICTURES, [[0, 1]], WORDS, MmtpConfig(2))


def test_captions_and_their_ends_are_learned() -> None:
    sequence = laid().sequence
    assert sequence.ids.tolist() == [1, 2, 2, 2, 2, 3, 10, 11, 0, 1, 2, 2, 3, 12, 0]
    assert sequence.labels[sequence.weight > 0].tolist() == [10, 11, 0, 12, 0]
    assert sequence.visual_row.tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1, 4, 5, -1, -1, -1]
    assert sequence.position[0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5, 6, 7, 8, 8, 10, 11, 12]  # a longer side behind
    assert laid().patches.shape == (6, 5) and laid().grids == [(2, 2), (1, 2)]


def test_a_prediction_is_across_an_image_at_its_edge_or_in_the_text() -> None:
    sequence = laid().sequence
    assert sequence.ahead is not None
    found = []
    for source_S, weight_S in zip(sequence.ahead.source.long(), sequence.ahead.weight, strict=True):
        places = places_of(sequence, source_S, WORDS).items()
        found.append({name: ((weight_S > 0) & where_S).nonzero().flatten().tolist() for name, where_S in places})
    assert found[0] == {"across": [], "edge": [4, 5, 11, 12], "text": [6]}
    assert found[1] == {"across": [3, 10], "edge": [4, 5, 11], "text": []}
