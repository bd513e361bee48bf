"""Positions: the learned table on each image's own grid, and the rotation of transformers' GLM-OCR encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cogvit.model.packing import raster
from cogvit.model.position import PositionTable, apply_rotary, rotary_2d


def test_each_image_reads_the_table_resized_to_its_own_grid() -> None:
    table = PositionTable(5, (4, 4))
    grids = [(2, 3), (0, 0), (4, 4), (3, 2), (2, 3)]
    present = [grid for grid in grids if grid[0]]
    slot = torch.cat([torch.full((rows * columns,), n) for n, (rows, columns) in enumerate(grids)])
    places = torch.cat([raster(*grid) for grid in present])
    padding = 3
    out = table(grids, F.pad(places, (0, 0, 0, padding), value=99), F.pad(slot, (0, padding), value=len(grids)))
    expected = [F.interpolate(table.embed, grid, mode="bicubic")[0].flatten(1).T for grid in present]
    torch.testing.assert_close(out[:-padding], torch.cat(expected))


def test_the_table_at_its_own_grid_is_exact() -> None:
    table = PositionTable(5, (3, 4))
    assert torch.equal(table.on_grid(3, 4), table.embed[0].flatten(1).T)


def test_a_pack_without_images_still_reads_the_table() -> None:
    table = PositionTable(5, (3, 4))
    table([(0, 0)], torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, dtype=torch.int64)).sum().backward()
    assert table.embed.grad is not None


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrVisionConfig
    from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionRotaryEmbedding, apply_rotary_pos_emb_vision

    theirs = GlmOcrVisionRotaryEmbedding(GlmOcrVisionConfig(hidden_size=64, num_heads=4))
    places = raster(5, 7)
    q, k = torch.randn(2, 35, 4, 16)
    cos, sin = theirs(q, places)
    ours = rotary_2d(places, 16)
    torch.testing.assert_close(ours, (cos, sin))
    for x, expected in zip((q, k), apply_rotary_pos_emb_vision(q, k, cos, sin), strict=True):
        torch.testing.assert_close(apply_rotary(x, *ours), expected)


def test_rotated_products_depend_on_the_difference_of_places_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float32)

    def product(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        (cos_a, sin_a), (cos_b, sin_b) = (rotary_2d(torch.tensor([place]), 16) for place in (a, b))
        return (apply_rotary(q, cos_a, sin_a) * apply_rotary(k, cos_b, sin_b)).sum()

    torch.testing.assert_close(product((3, 5), (1, 2)), product((12, 7), (10, 4)), atol=1e-5, rtol=1e-4)
    assert (product((3, 5), (1, 2)) - product((5, 3), (1, 2))).abs() > 1e-3


def test_rotation_keeps_the_dtype() -> None:
    cos, sin = rotary_2d(raster(2, 2), 8)
    assert apply_rotary(torch.randn(4, 1, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
