"""Text and images in one sequence: where images stand and which positions their tokens have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cogvit.batch import PackedSequence, TokensAhead
from cogvit.model.config import MmtpConfig
from cogvit.model.packing import Grid

Part = int | Grid  # so many tokens of text, or the rows and columns of an image's tokens


def parts_of_row(is_image: Sequence[bool], grids: Sequence[Grid], *, framed: bool = False) -> list[Part]:
    """Return text and images of one sequence, in its order.

    Args:
        is_image: for each token whether it is the image token.
        grids: rows and columns of tokens of each image.
        framed: whether a learned token stands before each image and one behind it.

    Errors: ValueError when the image tokens are not the images', one run for each.
    """
    parts: list[Part] = []
    rest, place = list(grids), 0
    while place < len(is_image):
        if not is_image[place]:
            stop = next((i for i in range(place, len(is_image)) if is_image[i]), len(is_image))
            parts.append(stop - place)
        else:
            size = num_tokens(rest[0], framed=framed) if rest else 0
            stop = place + size
            if not size or len(is_image) < stop or not all(is_image[place:stop]):
                break
            parts.append(rest.pop(0))
        place = stop
    if rest or place < len(is_image):
        wanted = [num_tokens(grid, framed=framed) for grid in grids]
        raise ValueError(
            f"{sum(is_image)} image tokens stand for images of {wanted} tokens; each image needs a run of as many as"
            " num_visual_tokens says"
        )
    return parts


def num_tokens(grid: Grid, *, framed: bool) -> int:
    """Return how many tokens stand for an image."""
    return grid[0] * grid[1] + (2 if framed else 0)


def expert_tokens(parts: Iterable[Part], *, framed: bool = False) -> Tensor:
    """Return which tokens of a sequence go through the visual experts, bool [T]: those of images.

    framed: as in `parts_of_row`; the token behind an image then goes through the language model, as CogVLM has it.
    """
    flags: list[bool] = []
    for part in parts:
        size = part if isinstance(part, int) else num_tokens(part, framed=framed)
        flags += [not isinstance(part, int)] * size
        if framed and flags:
            flags[-1] = False
    return torch.tensor(flags, dtype=torch.bool)


def part_positions(parts: Iterable[Part], *, by_place: bool, framed: bool = False) -> Tensor:
    """Return rotary positions [3, T] by time, row and column, int64.

    Args:
        parts: of one sequence.
        by_place: whether an image's tokens count by row and column, as GLM-OCR has it: the text after it goes on behind
            its longer side; otherwise every token has the next position.
        framed: as in `parts_of_row`; all tokens of an image then share one position between those around it, as CogVLM
            has it.

    Source: `get_rope_index` of transformers' GlmOcrModel; `build_position_ids` of CogVLM's modeling_cogvlm.py.
    """
    following, positions = 0, [torch.zeros(3, 0, dtype=torch.int64)]
    for part in parts:
        rows, columns = (1, part) if isinstance(part, int) else part
        if framed and not isinstance(part, int):
            own = [following, *[following + 1] * (rows * columns), following + 2]
            positions.append(torch.tensor(own).expand(3, -1))
            following += 3
        elif isinstance(part, int) or not by_place:
            positions.append(following + torch.arange(rows * columns).expand(3, -1))
            following += rows * columns
        else:
            row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            positions.append(following + torch.stack([torch.zeros_like(row), row, column]))
            following += max(rows, columns)
    return torch.cat(positions, dim=1)


def tokens_ahead(sequence: PackedSequence, mmtp: MmtpConfig, image_tokens: Sequence[int]) -> TokensAhead:
    """Return what the heads of a pack read and predict.

    Args:
        sequence: the pack.
        mmtp: how many depths, and what they see at images.
        image_tokens: for each image of the pack the rows that it has in the adapter's output.
    """
    num_tokens, is_image_S = len(sequence.ids), sequence.visual_row >= 0
    place_S = torch.arange(num_tokens)
    stop_S = torch.searchsorted(sequence.cu_seqlens[1:].contiguous(), place_S, right=True)
    stop_S = sequence.cu_seqlens[1:][stop_S.clamp(max=len(sequence.cu_seqlens) - 2)].long()
    before_S = is_image_S.cumsum(0)
    sources, weights, lengths = [], [], []
    for depth in range(1, mmtp.depths + 1):
        source_S = torch.minimum(place_S + depth, stop_S - 1)
        counts_S = place_S + depth < stop_S
        if mmtp.images == "token_path":
            counts_S &= before_S[source_S] == before_S
        elif mmtp.images == "masked":
            counts_S &= ~is_image_S[source_S]
            parts = is_image_S[source_S].logical_not().split(sequence.cu_seqlens.diff().tolist())
            lengths.append(tuple(int(part.sum()) for part in parts))
        sources.append(source_S)
        weights.append(sequence.weight[source_S] * counts_S)
    return TokensAhead(
        source=torch.stack(sources).to(torch.int32),
        weight=torch.stack(weights),
        slot=slots_of_images(sequence.visual_row, image_tokens, mmtp.tokens),
        counts=tuple(int((weight_S > 0).sum()) for weight_S in weights),
        lengths=tuple(lengths),
    )


def slots_of_images(visual_row_S: Tensor, image_tokens: Sequence[int], num_slots: int) -> Tensor:
    """Return which of K tokens stands at each place of an image, [S]: its rows in K equal stretches; -1 for text."""
    stop_N = torch.tensor([0, *image_tokens], device=visual_row_S.device).cumsum(0)
    row_S = visual_row_S.clamp(min=0).long()
    image_S = (torch.searchsorted(stop_N, row_S, right=True) - 1).clamp(max=max(len(image_tokens) - 1, 0))
    size_S = torch.tensor([*image_tokens] or [1], device=visual_row_S.device)[image_S]
    slot_S = (row_S - stop_N[image_S]) * num_slots // size_S
    return torch.where(visual_row_S >= 0, slot_S, -1).to(torch.int32)
