"""Boxes as text and back, and how well two of them agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.errors import DataError
from cogvit.model.boxes import Box, box_accuracy, boxes_text, intersection_over_union, read_boxes


def test_boxes_are_written_as_released() -> None:
    assert boxes_text([Box(0, 0, 50, 40)], 80, 100) == "[[000,000,500,500]]"
    assert boxes_text([Box(1, 2, 100, 80), Box(10, 8, 20, 16)], 80, 100) == "[[010,025,999,999;100,100,200,200]]"
    said = "A cat[[010,025,999,999]] on a mat [[100,100,200,200;5,6,7,8]], not [[1,2]] or [[a,b,c,d]]."
    assert [tuple(round(x, 3) for x in box) for box in read_boxes(said, 80, 100)] == [
        (1.0, 2.0, 99.9, 79.92),
        (10.0, 8.0, 20.0, 16.0),
        (0.5, 0.48, 0.7, 0.64),
    ]
    assert read_boxes("[[200,300,100,100]]", 1000, 1000) == [Box(100, 100, 200, 300)]
    assert read_boxes("nowhere", 80, 100) == []


@given(
    st.tuples(*[st.floats(0, 1) for _ in range(4)]).filter(
        lambda p: abs(p[0] - p[2]) > 0.01 and abs(p[1] - p[3]) > 0.01
    ),
    st.integers(10, 3000),
    st.integers(10, 3000),
)
def test_what_is_written_is_read_to_a_thousandth(part: tuple[float, ...], height: int, width: int) -> None:
    (x0, x1), (y0, y1) = sorted(part[::2]), sorted(part[1::2])
    box = Box(x0 * width, y0 * height, x1 * width, y1 * height)
    (read,) = read_boxes(boxes_text([box], height, width), height, width)
    for value, was, side in zip(read, box, (width, height) * 2, strict=True):
        assert -1e-6 <= was - value <= side / 1000 + 1e-6


@pytest.mark.parametrize(
    "box", [Box(-1, 0, 5, 5), Box(0, 0, 101, 5), Box(5, 0, 5, 5), Box(0, 5, 5, 4), Box(0, 0, 5, 81)]
)
def test_a_box_outside_of_its_image_is_refused(box: Box) -> None:
    with pytest.raises(DataError, match="is empty or outside of its image of 80 x 100 px") as error:
        boxes_text([box], 80, 100)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="there is no box"):
        boxes_text([], 80, 100)


def test_overlap_and_accuracy() -> None:
    a = Box(0, 0, 10, 10)
    assert intersection_over_union(a, a) == 1.0
    assert intersection_over_union(a, Box(5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert intersection_over_union(a, Box(10, 0, 20, 10)) == 0.0
    assert intersection_over_union(Box(1, 1, 1, 1), Box(1, 1, 1, 1)) == 0.0
    answers = [[a], [Box(0, 0, 10, 5), a], [Box(5, 0, 15, 10), a], []]
    assert box_accuracy(answers, [a] * 4) == 0.5
    assert box_accuracy(answers, [a] * 4, threshold=0.3) == 0.75
    with pytest.raises(ValueError, match="1 answers for 2 boxes"):
        box_accuracy([[a]], [a, a])
