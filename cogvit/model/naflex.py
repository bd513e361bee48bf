"""Native-resolution images: sizes that keep the aspect under a token budget, resizing, and batches of mixed sizes.

Source of the sizes: NaFlex of SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2; big_vision's
`get_resized_image_size`): the largest scale at which the image's grid, rounded up to whole patches, fits the budget.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvit.batch import PackedImages
from cogvit.model.packing import Grid, pack_images, patchify, raster


def naflex_grid(
    height_px: int, width_px: int, patch_size: int, max_patches: int, *, enlarge: bool = True, multiple: int = 1
) -> Grid:
    """Return the rows and columns of patches that an image is resized to.

    The published rule, exactly and in integers: big_vision searches the scale by bisection up to 100x.

    Args:
        height_px: of the image.
        width_px: of the image.
        patch_size: P, in px.
        max_patches: the budget.
        enlarge: whether an image smaller than the budget is enlarged to it; otherwise it keeps its size, rounded up to
            whole patches.
        multiple: both sides of the grid are multiples of it (2 for the 2 x 2 groups of a language model's adapter).

    Errors: ValueError when a side, the patch or the budget is not positive.
    """
    if height_px < 1 or width_px < 1:
        raise ValueError(f"an image of {height_px} x {width_px} px has no pixels; both sides must be positive")
    if patch_size < 1 or multiple < 1:
        raise ValueError(f"patch_size={patch_size} and multiple={multiple} must be at least 1")
    groups = max_patches // multiple**2
    if groups < 1:
        raise ValueError(f"a budget of {max_patches} patches cannot hold one group of {multiple} x {multiple}")
    unit_px = patch_size * multiple
    native = -(-height_px // unit_px), -(-width_px // unit_px)
    if not enlarge and native[0] * native[1] <= groups:
        return native[0] * multiple, native[1] * multiple
    # The grid changes only at scales where a side is a whole number of patches, and its area grows with the scale.
    budget = range(1, groups + 1)
    rows = bisect_right(budget, groups, key=lambda n: n * -(-width_px * n // height_px))
    columns = bisect_right(budget, groups, key=lambda n: n * -(-height_px * n // width_px))
    if rows * width_px >= columns * height_px:
        columns = -(-width_px * rows // height_px)
    else:
        rows = -(-height_px * columns // width_px)
    return rows * multiple, columns * multiple


def _kept_grid(
    height_px: int, width_px: int, patch_size: int, max_patches: int, *, enlarge: bool = True, multiple: int = 1
) -> Grid:
    """`naflex_grid`, but one whose aspect no grid keeps is refused."""
    grid = naflex_grid(height_px, width_px, patch_size, max_patches, enlarge=enlarge, multiple=multiple)
    line = max_patches // multiple**2
    if max(grid) == line * multiple and max(height_px, width_px) > line * min(height_px, width_px):
        raise ValueError(
            f"an image of {height_px} x {width_px} px is too thin: a line of {max(grid)} patches, the longest within "
            f"the budget of {max_patches}, would not keep its aspect"
        )
    return grid


def naflex_target_size(h: int, w: int, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """Return the height and width in px that an image of h x w px is resized to: whole patches within the budget.

    The aspect is kept up to rounding, and the scale is the largest at which the grid has at most max_tokens patches.

    Errors: ValueError when a side, the patch or the budget is not positive, or a side is more than max_tokens times the
    other, which no grid keeps.
    Source: NaFlex of SigLIP 2 (arXiv 2502.14786, section 2.4.2), which resizes such images too.
    """
    rows, columns = _kept_grid(h, w, patch_size, max_tokens)
    return rows * patch_size, columns * patch_size


_LARGEST_VALUE = 16.0  # of a float; those of images in [-1, 1], or of any usual mean and deviation, stay far below


def _check_images(images: Sequence[Tensor]) -> None:
    """Refuse what is no list of images of one kind, before anything is computed from it."""
    if not len(images):
        raise ValueError("the list of images is empty; expected at least one")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise ValueError(f"image {number} is a {type(image).__name__}; expected a tensor (C, H, W)")
        if image.ndim != 3:
            raise ValueError(f"image {number} has shape {tuple(image.shape)}; expected (C, H, W)")
        if image.is_floating_point() and not bool(torch.isfinite(image.sum(dtype=torch.float64))):
            raise ValueError(f"image {number} holds NaN or infinite values; expected finite ones")
        if image.is_floating_point() and image.numel() and float(image.abs().max()) > _LARGEST_VALUE:
            raise ValueError(
                f"image {number} holds floats up to {float(image.abs().max()):.4g}; expected [-1, 1], or torch.uint8"
            )
    channels, dtypes = {image.shape[0] for image in images}, {image.dtype for image in images}
    if len(channels) > 1:
        raise ValueError(f"images of one batch have {sorted(channels)} channels; expected one number")
    if torch.uint8 in dtypes and len(dtypes) > 1:
        raise ValueError(f"images of one batch are {sorted(map(str, dtypes))}; expected all torch.uint8 or all floats")


def resize_to_grid(image: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Resize [C, H, W] to a whole grid of patches, bilinear and antialiased; uint8 stays uint8, the rest becomes fp32.

    Errors: ValueError when the image is not [C, H, W].
    """
    if image.ndim != 3:
        raise ValueError(f"an image has shape {tuple(image.shape)}; expected (C, H, W)")
    size = (grid[0] * patch_size, grid[1] * patch_size)
    image = image if image.dtype == torch.uint8 else image.float()
    if image.shape[1:] == size:
        return image
    return F.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def naflex_resize(image: Tensor, patch_size: int, max_tokens: int) -> Tensor:
    """Resize one image [C, H, W] to its `naflex_target_size`, bilinear and antialiased; fp32 in [-1, 1] comes out.

    uint8 is normalized, as the model does it in a pack; floats are in [-1, 1] already.

    Errors: ValueError when the image is not [C, H, W], has no pixels, is not finite, holds floats far beyond [-1, 1] or
    is too thin for the budget.
    """
    _check_images([image])
    grid = _kept_grid(image.shape[1], image.shape[2], patch_size, max_tokens)
    resized = resize_to_grid(image, grid, patch_size).float()
    return resized / 127.5 - 1.0 if image.dtype == torch.uint8 else resized


def naflex_collate(images: Sequence[Tensor], patch_size: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return images of any size as one batch and its valid_mask, both for `CogViT`.

    An image's size depends on itself alone. Where a canvas of the most rows and columns keeps the budget, the batch is
    [B, C, H, W] with the images in the upper left corner, as the reference's. Where it would not (a wide image beside a
    tall one), it is sequences [B, N, C * P * P + 2] of patches followed by their row and column, N <= max_tokens.

    Args:
        images: each [C, H, W]; uint8, which is normalized, or floats in [-1, 1].
        patch_size: P, in px.
        max_tokens: the budget of each image, padding included.

    Errors: ValueError when the list is empty, an image is not [C, H, W], has no pixels, is not finite or is too thin
    for the budget, or the images differ in channels or kind.
    """
    _check_images(images)
    resized = [naflex_resize(image, patch_size, max_tokens) for image in images]
    grids = [(image.shape[1] // patch_size, image.shape[2] // patch_size) for image in resized]
    rows, columns = max(grid[0] for grid in grids), max(grid[1] for grid in grids)
    if rows * columns > max_tokens:
        return _sequences(resized, grids, patch_size)
    batch = resized[0].new_zeros(len(images), images[0].shape[0], rows * patch_size, columns * patch_size)
    valid = torch.zeros(len(images), rows, columns, dtype=torch.bool, device=batch.device)
    for index, (image, grid) in enumerate(zip(resized, grids, strict=True)):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        valid[index, : grid[0], : grid[1]] = True
    return batch, valid.flatten(1)


def _sequences(images: Sequence[Tensor], grids: Sequence[Grid], patch_size: int) -> tuple[Tensor, Tensor]:
    placed = [
        torch.cat([patchify(image, patch_size), raster(*grid).to(image)], dim=1)
        for image, grid in zip(images, grids, strict=True)
    ]
    valid = [torch.ones(len(image), dtype=torch.bool, device=image.device) for image in placed]
    return pad_sequence(placed, batch_first=True), pad_sequence(valid, batch_first=True)


def naflex_pack(
    images: Sequence[Tensor],
    patch_size: int,
    max_tokens: int,
    *,
    tokens_per_pack: int | None = None,
    images_per_pack: int | None = None,
    enlarge: bool = True,
    multiple: int = 1,
) -> PackedImages:
    """Resize images of any size and lay them end to end for `CogViT.forward_packed`, without padding.

    An image gets the largest grid that fits its budget (`naflex_target_size`), resized bilinear and antialiased.

    Args:
        images: each [C, H, W]; uint8 is normalized by the model, floats are in [-1, 1].
        patch_size: P, in px.
        max_tokens: the budget of each image.
        tokens_per_pack: T; the images' own sum if None.
        images_per_pack: N; their number if None.
        enlarge: whether an image smaller than the budget is enlarged to it; otherwise it keeps its size, rounded up to
            whole patches.
        multiple: both sides of an image's grid are multiples of it (2 for the 2 x 2 groups of an adapter).

    Errors: ValueError when the list is empty, an image is not [C, H, W], has no pixels, is not finite or is too thin
    for the budget, the images differ in channels or kind, or they do not fit the pack.
    """
    _check_images(images)
    patches, grids = [], []
    for image in images:
        grid = _kept_grid(image.shape[1], image.shape[2], patch_size, max_tokens, enlarge=enlarge, multiple=multiple)
        patches.append(patchify(resize_to_grid(image, grid, patch_size), patch_size))
        grids.append(grid)
    return pack_images(patches, grids, tokens_per_pack=tokens_per_pack, images_per_pack=images_per_pack)
