"""Where a patch is: a learned 2-D table added to the tokens, or a 2-D rotation of queries and keys.

Both read a patch's place in its own image, so no neighbor in a batch or pack can change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from cogvit.batch import sent

_ROTARY_BASE = 10000.0


class PositionTable(nn.Module):
    """A learned table of H x W positions, resized bicubically to each image's own grid (the reference's rule)."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(1, dim, *grid).normal_(std=0.02))

    def on_grid(self, rows: int, columns: int) -> Tensor:
        """Return the table at one grid, [rows * columns, D] in raster order."""
        return rearrange(resized_table(self.embed, (rows, columns)), "1 d rows columns -> (rows columns) d")

    def forward(self, grids: Sequence[tuple[int, int]], row_col_T2: Tensor, slot_T: Tensor) -> Tensor:
        """Return the position of every token, [T, D].

        Args:
            grids: rows and columns of each of the N slots; (0, 0) where absent.
            row_col_T2: place of each token in its own image.
            slot_T: slot of each token; N for padding, which gets some position.
        """
        first: dict[tuple[int, int], int] = {}  # row of the table where each distinct grid begins
        num_rows = 0
        for rows, columns in grids:
            if rows and (rows, columns) not in first:
                first[rows, columns] = num_rows
                num_rows += rows * columns
        # A pack of nothing but padding still reads the table, so that every rank has its (zero) gradient.
        tables = [self.on_grid(*grid) for grid in first] or [self.on_grid(*self.embed.shape[-2:])]
        place = [(first.get(grid, 0), grid[1]) for grid in grids] + [(0, 0)]
        start_T, columns_T = sent(place, slot_T.device)[slot_T].unbind(1)
        index_T = start_T + row_col_T2[:, 0] * columns_T + row_col_T2[:, 1]
        return F.embedding(torch.where(slot_T < len(grids), index_T, 0), torch.cat(tables))


def resized_table(embed_1DHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a position table on another grid, bicubic; as it is where the grid is its own."""
    if embed_1DHW.shape[-2:] == grid:
        return embed_1DHW
    if embed_1DHW.is_cuda and embed_1DHW.requires_grad and torch.are_deterministic_algorithms_enabled():
        return resized_by_products(embed_1DHW, grid)  # the gradient of the other adds with atomics
    return F.interpolate(embed_1DHW, size=grid, mode="bicubic", align_corners=False)


def resized_by_products(embed_1DHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return what bicubic interpolation does, as a matrix product by rows and one by columns."""

    def weights(length: int, size: int) -> Tensor:
        """How much of each of the table's rows is in each of the grid's, [size, length]."""
        one = torch.eye(length, dtype=embed_1DHW.dtype, device=embed_1DHW.device).view(1, length, length, 1)
        return F.interpolate(one, size=(size, 1), mode="bicubic", align_corners=False).view(length, size).T

    by_row, by_column = (weights(length, size) for length, size in zip(embed_1DHW.shape[-2:], grid, strict=True))
    with torch.autocast(embed_1DHW.device.type, enabled=False):
        return by_row @ embed_1DHW @ by_column.T


def rotary_2d(row_col_T2: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, K] of the axial rotation.

    A quarter of the angles turn by row, a quarter by column, and both again for the second half of the channels.
    Source: GlmOcrVisionRotaryEmbedding of transformers, base 10000.
    """
    half = head_dim // 2
    step = torch.arange(0, half, 2, device=row_col_T2.device, dtype=torch.float32) / half
    angle_T2F = row_col_T2.to(torch.float32).unsqueeze(-1) * _ROTARY_BASE**-step
    angle_TK = repeat(angle_T2F, "t row_col f -> t (half row_col f)", half=2)
    return angle_TK.cos(), angle_TK.sin()


def apply_rotary(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + K / 2) of every head by `rotary_2d`, in fp32 or better; keeps the dtype."""
    cos, sin = (angle.chunk(2, dim=-1)[0].unsqueeze(-2) for angle in (cos_TK, sin_TK))
    low, high = x_THK.to(torch.promote_types(x_THK.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_THK.dtype)
