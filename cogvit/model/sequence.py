"""Text and images in one sequence: where images stand and which positions their tokens have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cogvit.model.packing import Grid

Part = int | Grid  # so many tokens of text, or the rows and columns of an image's tokens


def parts_of_row(is_image: Sequence[bool], grids: Sequence[Grid]) -> list[Part]:
    """Return text and images of one sequence, in its order.

    Args:
        is_image: for each token whether it is the image token.
        grids: rows and columns of tokens of each image.

    Errors: ValueError when the image tokens are not the images', one run for each.
    """
    parts: list[Part] = []
    rest, place = list(grids), 0
    while place < len(is_image):
        if not is_image[place]:
            stop = next((i for i in range(place, len(is_image)) if is_image[i]), len(is_image))
            parts.append(stop - place)
        else:
            size = rest[0][0] * rest[0][1] if rest else 0
            stop = place + size
            if not size or len(is_image) < stop or not all(is_image[place:stop]):
                break
            parts.append(rest.pop(0))
        place = stop
    if rest or place < len(is_image):
        wanted = [rows * columns for rows, columns in grids]
        raise ValueError(
            f"{sum(is_image)} image tokens stand for images of {wanted} tokens; each image needs a run of as many as"
            " num_visual_tokens says"
        )
    return parts


def part_positions(parts: Iterable[Part], *, by_place: bool) -> Tensor:
    """Return rotary positions [3, T] by time, row and column, int64.

    Args:
        parts: of one sequence.
        by_place: whether an image's tokens count by row and column, as GLM-OCR has it: the text after it goes on behind
            its longer side; otherwise every token has the next position.

    Source: `get_rope_index` of transformers' GlmOcrModel.
    """
    following, positions = 0, [torch.zeros(3, 0, dtype=torch.int64)]
    for part in parts:
        rows, columns = (1, part) if isinstance(part, int) else part
        if isinstance(part, int) or not by_place:
            positions.append(following + torch.arange(rows * columns).expand(3, -1))
            following += rows * columns
        else:
            row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            positions.append(following + torch.stack([torch.zeros_like(row), row, column]))
            following += max(rows, columns)
    return torch.cat(positions, dim=1)
