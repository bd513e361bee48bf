"""Images and dense batches as packs of patches: whole images end to end, each patch with its place in its own image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from cogvit.batch import HostView, PackedImages

Grid = tuple[int, int]  # rows, columns in patches


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [..., C, H, W] into patches [..., rows * columns, C * P * P], channel-major, in raster order.

    Errors: ValueError when the patch does not divide the image.
    """
    height_px, width_px = images.shape[-2:]
    if height_px % patch_size or width_px % patch_size or not height_px or not width_px:
        raise ValueError(
            f"an image of {height_px} x {width_px} px cannot be cut into patches of patch_size={patch_size};"
            f" both sides must be multiples of it (naflex_resize gives such a size)"
        )
    return rearrange(images, "... c (rows p) (columns q) -> ... (rows columns) (c p q)", p=patch_size, q=patch_size)


def raster(rows: int, columns: int) -> Tensor:
    """Return the places [rows * columns, 2] int32 of a grid's patches."""
    index = torch.arange(rows * columns, dtype=torch.int32)
    return torch.stack([index // columns, index % columns], dim=1)


def pack_images(
    patches: Sequence[Tensor],
    grids: Sequence[Grid],
    *,
    tokens_per_pack: int | None = None,
    images_per_pack: int | None = None,
    key_N: Tensor | None = None,
) -> PackedImages:
    """Lay images end to end in one pack.

    Args:
        patches: of each image, [rows * columns, C * P * P], all of one dtype.
        grids: rows and columns of each image.
        tokens_per_pack: T; the images' own sum if None.
        images_per_pack: N; their number if None.
        key_N: int64 seed of each image's draws; 0 if None.

    Errors: ValueError when there is no image or they do not fit T or N.
    """
    if not patches:
        raise ValueError("there are no images to pack")
    lengths = [len(image) for image in patches]
    num_tokens = sum(lengths) if tokens_per_pack is None else tokens_per_pack
    num_slots = len(patches) if images_per_pack is None else images_per_pack
    if sum(lengths) > num_tokens or len(patches) > num_slots:
        raise ValueError(
            f"{len(patches)} images of {sum(lengths)} patches do not fit tokens_per_pack={num_tokens} and"
            f" images_per_pack={num_slots}"
        )
    device, absent, padding = patches[0].device, num_slots - len(patches), num_tokens - sum(lengths)
    bounds = torch.tensor([0, *lengths, *[0] * absent, padding]).cumsum(0)
    present_N = torch.tensor([1.0] * len(patches) + [0.0] * absent)
    if key_N is None:
        key_N = torch.zeros(num_slots, dtype=torch.int64)
    return PackedImages(
        patches=torch.cat([*patches, patches[0].new_zeros(padding, patches[0].shape[1])]),
        row_col=torch.cat([raster(*grid) for grid in grids] + [torch.zeros(padding, 2, dtype=torch.int32)]).to(device),
        cu_seqlens=bounds.to(torch.int32).to(device),
        grid_hw=torch.tensor([*grids, *[(0, 0)] * absent], dtype=torch.int32).to(device),
        key=key_N.to(device),
        weight=present_N.to(device),
        host=HostView((*lengths, *[0] * absent, padding), (*grids, *[(0, 0)] * absent)),
    )


def pack_batch(batch: Tensor, valid_BN: Tensor | None, patch_size: int, key_B: Tensor) -> PackedImages:
    """Pack the valid patches of a dense batch; each image's grid is the smallest that holds them.

    Args:
        batch: images [B, C, H, W], or sequences [B, N, C * P * P + 2] of patches with their row and column.
        valid_BN: bool, true where a patch belongs to its image; all if None.
        patch_size: P.
        key_B: int64 seed of each image's draws.

    Errors: ValueError when an image has no valid patch or a sequence's places are not those of a grid.
    """
    size, host = len(batch), None
    if batch.ndim == 4:
        patches, (rows, columns) = patchify(batch, patch_size), (side // patch_size for side in batch.shape[2:])
        places = raster(rows, columns).to(batch.device).expand(size, -1, 2)
        if valid_BN is None:
            host = HostView((rows * columns,) * size + (0,), ((rows, columns),) * size)
    else:
        patches, places = batch[..., :-2], batch[..., -2:].to(torch.int32)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool, device=batch.device) if valid_BN is None else valid_BN
    length_B = valid.sum(1)
    grid_B2 = (places * valid.unsqueeze(2)).amax(1) + 1
    if valid_BN is not None and not bool((length_B > 0).all()):
        raise ValueError(f"image {int(length_B.argmin())} of the batch has no valid patch in valid_mask")
    if batch.ndim == 3:
        _check_places(places, valid, grid_B2)
    bounds = torch.cat([length_B.new_zeros(1), length_B, length_B.new_zeros(1)]).cumsum(0)
    return PackedImages(
        patches=patches.flatten(0, 1) if valid_BN is None else patches[valid],
        row_col=places.flatten(0, 1) if valid_BN is None else places[valid],
        cu_seqlens=bounds.to(torch.int32),
        grid_hw=grid_B2,
        key=key_B,
        weight=torch.ones(size, device=batch.device),
        host=host,
    )


def _check_places(places: Tensor, valid: Tensor, grid_B2: Tensor) -> None:
    """Catch sequences whose last two channels were scaled, rounded or cut, which would move every patch."""
    index = places[..., 0] * grid_B2[:, None, 1] + places[..., 1]
    expected = valid.cumsum(1) - 1
    if not bool(torch.where(valid, index == expected, True).all()) or not torch.equal(valid.sum(1), grid_B2.prod(1)):
        raise ValueError(
            "the last two channels of a patch sequence must be each patch's row and column in raster order; keep the"
            " batch of naflex_collate in fp32 and normalize images before collating them"
        )
