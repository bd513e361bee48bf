"""A stretch of a local parameter as rectangles of the plain tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cogvit.parallel.convert import PlainTensor, Split, to_local
from cogvit.parallel.rectangles import rectangles

SHAPES = {
    Split.REPLICATED: [(7,), (5, 3), (3, 4, 2), (2, 3, 2, 3)],
    Split.ROWS: [(8,), (8, 3)],
    Split.COLUMNS: [(3, 8)],
    Split.GATE_UP: [(16,), (16, 3)],
    Split.QKV: [(48,), (48, 5)],
}
# Heads of queries, and of keys and values.
CASES = [(split, one, (4, 4)) for split, shapes in SHAPES.items() for one in shapes]
CASES += [(Split.QKV, one, (8, 4)) for one in SHAPES[Split.QKV]]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("split", "shape", "heads"), CASES)
@given(data=st.data())
def test_stretches_of_all_ranks_are_the_plain_tensor(
    split: Split, shape: tuple[int, ...], heads: tuple[int, int], tp_size: int, data: st.DataObject
) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    stored = torch.full_like(full, -1)
    for tp_rank in range(tp_size):
        described = PlainTensor("name", nn.Parameter(torch.empty(0)), split, *heads)
        local = to_local(described, full, tp_rank, tp_size)
        described = PlainTensor("name", nn.Parameter(local.float()), split, *heads)
        cuts = data.draw(st.lists(st.integers(0, local.numel()), max_size=5).map(sorted))
        for start, stop in zip([0, *cuts], [*cuts, local.numel()], strict=True):
            expected = start
            for first, offsets, sizes in rectangles(described, start, stop, tp_rank, tp_size):
                assert first == expected and len(offsets) == len(sizes) == len(shape)
                place = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
                expected += torch.Size(sizes).numel()
                stored[place] = local.flatten()[first:expected].view(sizes)
            assert expected == max(start, stop)
    assert torch.equal(stored, full)


def test_a_stretch_of_a_matrix_is_three_rectangles_at_most() -> None:
    described = PlainTensor("name", nn.Parameter(torch.empty(9, 10)), Split.REPLICATED, 0, 0)
    assert list(rectangles(described, 17, 63, 0, 1)) == [
        (17, (1, 7), (1, 3)),
        (20, (2, 0), (4, 10)),
        (60, (6, 0), (1, 3)),
    ]
    assert list(rectangles(described, 23, 28, 0, 1)) == [(23, (2, 3), (1, 5))]
