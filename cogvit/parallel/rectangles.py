"""Where a stretch of a local parameter lies in its plain tensor: a few rectangles, so that nobody puts it together.

ZeRO gives a rank a stretch of the flat local tensor. Of a row-major matrix that is the end of a row, whole rows and the
beginning of a row; where Megatron orders rows in its own way (`convert.Split`), as much of every block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from cogvit.parallel.convert import PlainTensor, Split


class Rectangle(NamedTuple):
    """A part of a plain tensor whose elements lie end to end in the local one."""

    start: int  # of its elements in the flat local tensor
    offsets: tuple[int, ...]  # in the plain tensor
    sizes: tuple[int, ...]


class _Block(NamedTuple):
    """Rows of the local tensor that follow one another in the plain one too."""

    first: int
    rows: int
    offsets: tuple[int, ...]  # in the plain tensor


def rectangles(tensor: PlainTensor, start: int, stop: int, tp_rank: int, tp_size: int) -> Iterator[Rectangle]:
    """Yield where the elements [start, stop) of this rank's flat parameter lie, in their order."""
    _, *rest = tensor.parameter.shape
    for block in _blocks(tensor, tp_rank, tp_size):
        base = block.first * prod(rest)
        low, high = max(start - base, 0), min(stop - base, block.rows * prod(rest))
        for first, offsets, sizes in _cut((block.rows, *rest), low, high):
            placed = tuple(a + b for a, b in zip(block.offsets, offsets, strict=True))
            yield Rectangle(base + first, placed, sizes)


def _blocks(tensor: PlainTensor, tp_rank: int, tp_size: int) -> Iterator[_Block]:
    rows, *rest = tensor.parameter.shape
    zeros = (0,) * len(rest)
    if tensor.split is Split.REPLICATED:
        yield _Block(0, rows, (0, *zeros))
    elif tensor.split is Split.ROWS:
        yield _Block(0, rows, (tp_rank * rows, *zeros))
    elif tensor.split is Split.COLUMNS:
        yield _Block(0, rows, (0, tp_rank * rest[0], *zeros[1:]))
    elif tensor.split is Split.GATE_UP:
        half = rows // 2
        for which in range(2):
            yield _Block(which * half, half, ((which * tp_size + tp_rank) * half, *zeros))
    else:
        # Of each key-value head of this rank: the queries that it serves, its keys, its values.
        heads, groups = tensor.num_heads, tensor.num_kv_heads
        queries = heads // groups
        size = rows // (groups // tp_size * (queries + 2))  # of one head
        first = 0
        for group in range(tp_rank * groups // tp_size, (tp_rank + 1) * groups // tp_size):
            for place, count in ((group * queries, queries), (heads + group, 1), (heads + groups + group, 1)):
                yield _Block(first, count * size, (place * size, *zeros))
                first += count * size


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield (start, offsets, sizes) of the rectangles that the flat stretch [start, stop) of a tensor consists of."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if start % row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        yield first * row, (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and stop % row:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: tuple[int, ...], index: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    base = index * prod(shape[1:])
    for first, offsets, sizes in _cut(shape[1:], start - base, stop - base):
        yield base + first, (index, *offsets), (1, *sizes)
