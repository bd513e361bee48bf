"""Native-resolution sizes, batches and packs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvit.model.naflex import (
    naflex_collate,
    naflex_grid,
    naflex_pack,
    naflex_resize,
    naflex_target_size,
    resize_to_grid,
)
from cogvit.model.packing import patchify
from cogvit.model.vit import CogViT
from tests.plain_vit import FAMILIES, tiny_vit

side = st.integers(1, 5000)


class TestSizes:
    @given(side, side, st.sampled_from([1, 14, 16]), st.integers(4, 1024), st.booleans(), st.sampled_from([1, 2]))
    def test_keep_the_budget_and_the_aspect(
        self, height: int, width: int, patch: int, budget: int, enlarge: bool, multiple: int
    ) -> None:
        rows, columns = naflex_grid(height, width, patch, budget, enlarge=enlarge, multiple=multiple)
        assert 1 <= rows * columns <= budget
        assert rows % multiple == columns % multiple == 0
        # Some scale gives exactly this grid: a range of heights and a range of widths overlap.
        rows, columns = rows // multiple, columns // multiple
        assert (rows - 1) * width < columns * height
        assert (columns - 1) * height < rows * width

    @given(side, side, st.integers(1, 1024))
    def test_are_the_largest_that_fit(self, height: int, width: int, budget: int) -> None:
        rows, columns = naflex_grid(height, width, 14, budget)
        # Just above the scale where this grid ends, the side that fills its patches first (or both) takes one more.
        more_rows = rows + (rows * width <= columns * height)
        more_columns = columns + (columns * height <= rows * width)
        assert more_rows * more_columns > budget

    def test_are_the_published_ones(self) -> None:
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        draw = random.Random(0)
        differ = 0
        for _ in range(3000):
            height, width = draw.randint(16, 4000), draw.randint(16, 4000)
            patch, budget = draw.choice([14, 16]), draw.choice([64, 256, 576, 1024])
            ours = tuple(side * patch for side in naflex_grid(height, width, patch, budget))
            theirs = get_image_size_for_max_num_patches(height, width, patch, budget)
            if ours != theirs:  # their search stops 1e-5 short of a larger size that fits
                differ += 1
                assert ours[0] >= theirs[0]
                assert ours[1] >= theirs[1]
        assert differ <= 3

    def test_small_images_may_keep_their_size(self) -> None:
        assert naflex_grid(30, 50, 14, 256, enlarge=False) == (3, 4)
        assert naflex_grid(30, 50, 14, 256, enlarge=False, multiple=2) == (4, 4)
        assert naflex_grid(3000, 5000, 14, 256, enlarge=False) == naflex_grid(3000, 5000, 14, 256)

    def test_thin_images(self) -> None:
        assert naflex_target_size(1, 256, 14, 256) == (14, 256 * 14)
        assert naflex_target_size(256, 1, 14, 256) == (256 * 14, 14)
        for sides in ((1, 100_000), (100_000, 1), (1, 257)):
            with pytest.raises(ValueError, match=f"an image of {sides[0]} x {sides[1]} px is too thin"):
                naflex_target_size(*sides, 14, 256)
        for make in (naflex_resize, lambda image, *size: naflex_collate([image], *size)):
            with pytest.raises(ValueError, match="1 x 100000 px is too thin: a line of 64 patches"):
                make(torch.rand(3, 1, 100_000), 8, 64)
        with pytest.raises(ValueError, match="1 x 100000 px is too thin: a line of 32 patches"):
            naflex_pack([torch.rand(3, 1, 100_000)], 8, 67, multiple=2)
        kept = naflex_pack([torch.rand(3, 1, 100)], 8, 64, enlarge=False)
        assert kept.grid_hw.tolist() == [[1, 13]]

    def test_bad_input(self) -> None:
        for height, width in ((0, 5), (5, 0), (-1, 5)):
            with pytest.raises(ValueError, match=f"{height} x {width} px"):
                naflex_target_size(height, width, 14, 256)
        with pytest.raises(ValueError, match="budget of 3 patches"):
            naflex_grid(10, 10, 14, 3, multiple=2)
        for patch, multiple in ((0, 1), (14, 0)):
            with pytest.raises(ValueError, match=f"patch_size={patch} and multiple={multiple} must be at least 1"):
                naflex_grid(10, 10, patch, 256, multiple=multiple)


class TestResize:
    def test_is_antialiased(self) -> None:
        small = naflex_resize(torch.rand(3, 512, 512), 16, 16)
        assert small.shape == (3, 64, 64)
        assert small.std() < 0.05  # the average of 64 pixels or more; of 4 it would be 0.14

    def test_keeps_uint8_and_exact_sizes(self) -> None:
        image = torch.randint(0, 256, (3, 28, 42)).to(torch.uint8)
        assert torch.equal(resize_to_grid(image, (2, 3), 14), image)
        assert resize_to_grid(image, (4, 4), 14).dtype == torch.uint8


def test_patches_are_those_of_the_convolution() -> None:
    image = torch.randn(2, 3, 16, 24)
    weight = torch.randn(5, 3, 8, 8)
    expected = torch.nn.functional.conv2d(image, weight, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(image, 8) @ weight.flatten(1).T, expected, atol=1e-4, rtol=1e-4)


def encode_alone(model: CogViT, image: Tensor, budget: int) -> Tensor:
    batch, valid = naflex_collate([image], 8, budget)
    return model(batch.double(), valid_mask=valid)["patch_tokens"][0][valid[0]]


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
class TestCollate:
    sizes = st.lists(st.tuples(st.integers(8, 120), st.integers(8, 120)), min_size=1, max_size=4)

    @settings(max_examples=20)
    @given(sizes)
    def test_budget_and_features_are_each_images_own(
        self, options: dict[str, object], sizes: list[tuple[int, int]]
    ) -> None:
        model = tiny_vit(**options).eval()
        images = [torch.randn(3, *size) for size in sizes]
        batch, valid = naflex_collate(images, 8, 24)
        assert valid.shape[1] <= 24
        assert valid.sum(1).tolist() == [h * w // 64 for h, w in (naflex_target_size(*size, 8, 24) for size in sizes)]
        with torch.no_grad():
            out = model(batch.double(), valid_mask=valid)["patch_tokens"]
            for n, image in enumerate(images):
                assert (out[n][valid[n]] - encode_alone(model, image, 24)).abs().max() <= 1e-6

    def test_a_wide_and_a_tall_image_keep_the_budget(self, options: dict[str, object]) -> None:
        model = tiny_vit(**options).float().eval()
        batch, valid = naflex_collate([torch.randn(3, 64, 256), torch.randn(3, 256, 64)], 8, 64)
        assert valid.shape == (2, 64)
        out = model(batch, valid_mask=valid)
        assert out["patch_tokens"].shape == (2, 64, 32)
        assert out["grid"] == [(4, 16), (16, 4)]


def test_a_canvas_within_the_budget_is_the_references_form() -> None:
    images = [torch.rand(3, 40, 40), torch.rand(3, 35, 45)]  # grids 8 x 8 and 7 x 9
    batch, valid = naflex_collate(images, 8, 72)
    assert batch.shape == (2, 3, 64, 72)
    assert valid.view(2, 8, 9)[:, :, -1].tolist() == [[False] * 8, [True] * 7 + [False]]
    assert torch.equal(batch[0, :, :64, :64], naflex_resize(images[0], 8, 72))
    assert not batch[0, :, :, 64:].any()
    assert not batch[1, :, 56:].any()


WRONG_LISTS = {
    "the list of images is empty": [],
    r"\[1, 3\] channels": [torch.rand(3, 9, 9), torch.rand(1, 9, 9)],
    r"image 1 has shape \(9, 9\); expected \(C, H, W\)": [torch.rand(3, 9, 9), torch.rand(9, 9)],
    "image 1 holds NaN or infinite": [torch.rand(3, 9, 9), torch.full((3, 9, 9), torch.nan)],
    "image 0 holds NaN or infinite": [torch.full((3, 9, 9), torch.inf)],
    r"\['torch.float32', 'torch.uint8'\]; expected": [torch.rand(3, 9, 9), torch.zeros(3, 9, 9, dtype=torch.uint8)],
    "an image of 0 x 9 px has no pixels": [torch.rand(3, 0, 9)],
    "image 0 is a ndarray; expected a tensor": [np.zeros((3, 9, 9))],
}


@pytest.mark.parametrize(("message", "images"), WRONG_LISTS.items(), ids=WRONG_LISTS)
def test_lists_that_are_no_batch_are_refused(message: str, images: list[Tensor]) -> None:
    for make in (naflex_collate, naflex_pack):
        with pytest.raises(ValueError, match=message):
            make(images, 8, 64)
    if len(images) == 1:
        with pytest.raises(ValueError, match=message):
            naflex_resize(images[0], 8, 64)


def test_an_image_of_one_row_is_encoded() -> None:
    model = tiny_vit().float()
    packed = naflex_pack([torch.rand(3, 1, 64), torch.rand(3, 16, 16)], 8, 64)
    assert packed.grid_hw.tolist() == [[1, 64], [8, 8]]
    assert model.forward_packed(packed).patch_TD.isfinite().all()


def test_sequences_that_were_scaled_or_rounded_are_refused() -> None:
    model = tiny_vit().float()
    batch, valid = naflex_collate([torch.rand(3, 64, 256), torch.rand(3, 256, 64)], 8, 64)
    assert batch.ndim == 3
    for broken in ((batch - 0.5) / 0.5, batch / 255, batch.flip(1)):
        with pytest.raises(ValueError, match="row and column in raster order"):
            model(broken, valid_mask=valid)
    with pytest.raises(ValueError, match="row and column in raster order"):
        model(batch[:, 1:], valid_mask=valid[:, 1:])
    assert model(batch[1:], valid_mask=valid[1:])["grid"] == [(16, 4)]


class TestPack:
    def test_equals_the_padded_batch(self) -> None:
        model = tiny_vit().eval()
        images = [torch.rand(3, 30, 90), torch.rand(3, 50, 20), torch.rand(3, 32, 32)]
        packed = naflex_pack(images, 8, 24, tokens_per_pack=80, images_per_pack=5)
        out = model.forward_packed(replace(packed, patches=packed.patches.double())).patch_TD
        for n, image in enumerate(images):
            start, stop = packed.cu_seqlens[n : n + 2].tolist()
            assert (out[start:stop] - encode_alone(model, image, 24)).abs().max() <= 1e-6

    def test_has_no_padding_unless_asked(self) -> None:
        images = [torch.randint(0, 256, (3, 30, 90)).to(torch.uint8), torch.zeros(3, 50, 20, dtype=torch.uint8)]
        packed = naflex_pack(images, 8, 24)
        assert packed.patches.dtype == torch.uint8
        assert packed.num_tokens == int(packed.grid_hw.prod(1).sum()) == packed.cu_seqlens[-1] == packed.cu_seqlens[-2]
        stacked = naflex_pack(torch.stack([images[0], images[0]]), 8, 24)
        assert torch.equal(stacked.patches, naflex_pack([images[0], images[0]], 8, 24).patches)
        padded = naflex_pack(images, 8, 24, tokens_per_pack=60, images_per_pack=4)
        assert padded.num_tokens == 60
        assert padded.grid_hw[2:].tolist() == [[0, 0], [0, 0]]
        assert padded.weight.tolist() == [1.0, 1.0, 0.0, 0.0]

    def test_native_sizes_in_groups(self) -> None:
        packed = naflex_pack([torch.rand(3, 30, 50)], 8, 256, enlarge=False, multiple=2)
        assert packed.grid_hw.tolist() == [[4, 8]]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="1 images of 24 patches do not fit tokens_per_pack=20"):
            naflex_pack([torch.rand(3, 40, 60)], 8, 24, tokens_per_pack=20)
        with pytest.raises(ValueError, match="images_per_pack=1"):
            naflex_pack([torch.rand(3, 8, 8)] * 2, 8, 24, images_per_pack=1)
