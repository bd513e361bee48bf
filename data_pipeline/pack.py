"""A pack of images: decoded, each in its own size, laid end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import Batch, PackedImages, SharpImages
from cogvit.config import RunConfig
from cogvit.errors import DataError
from data_pipeline.assembly import assemble_images
from data_pipeline.augment import augmentation_of, views_of
from data_pipeline.balance import PackLimits
from data_pipeline.decode import Encoded, decode_patches
from data_pipeline.topology import Slice

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Decoded:
    """A pack of images, with what became of those that this rank decodes."""

    images: PackedImages
    decoded: int  # or tried to
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Patches:
    """Images of a pack as patches: None where one does not decode."""

    each: list[Tensor | None]
    width: int  # bytes of a patch; 0 where other ranks decode all
    decoded: int  # of them, by this rank, or tried to
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A microbatch, with what became of its samples on the way."""

    batch: Batch
    decoded: int  # images that this rank decodes, or tried to
    failures: tuple[str, ...]
    cut: int  # texts that lost their end
    dropped: int = 0  # images whose place was in such an end


def pack_limits(config: RunConfig) -> PackLimits:
    """Return the caps of a run's packs."""
    data = config.data
    parallel = config.parallel
    return PackLimits(
        data.tokens_per_pack,
        data.images_per_pack,
        data.text_tokens_per_pack,
        min_packs=parallel.pp,
        trims=not data.full_packs and parallel.pp == 1,  # pipeline messages have one size
        tensor_ranks=parallel.tp,
    )


def decode_pack(
    config: RunConfig,
    grid_hw: Ints,
    key: Ints,
    decodes: Slice | None,
    read: Callable[[int], Encoded],
    name: Callable[[int], str],
) -> Decoded:
    """Pack images, of which those that other ranks decode are zeros here; without width where all are.

    read and name take the place of an image in the pack; a name is for the message when it does not decode.
    """
    found = _patches(config, config.vision.patch_size, grid_hw, key, decodes, read, name)
    images = assemble_images(found.each, grid_hw, key, found.width, pack_limits(config))
    return Decoded(images, found.decoded, found.failures)


def decode_sharp(
    config: RunConfig,
    count: tuple[int, ...],
    key: Ints,
    decodes: Slice | None,
    read: Callable[[int], Encoded],
    name: Callable[[int], str],
) -> tuple[SharpImages, Patches]:
    """Return images as a second encoder sees them, and what became of each; the rest is as in `decode_pack`.

    count: images of each sample, which lie end to end.
    """
    module = config.cross
    side = module.image_size // module.patch_size
    found = _patches(config, module.patch_size, np.full((len(key), 2), side), key, decodes, read, name)
    packed = torch.zeros(len(key), module.rows_per_image, found.width, dtype=torch.uint8)
    for place, image in zip(packed, found.each, strict=True):
        if image is not None:
            place[:] = image
    return SharpImages(packed.flatten(0, 1), count), found


def _patches(
    config: RunConfig,
    patch_px: int,
    grid_hw: Ints,
    key: Ints,
    decodes: Slice | None,
    read: Callable[[int], Encoded],
    name: Callable[[int], str],
) -> Patches:
    views = views_of(key, augmentation_of(config.data))
    mine = [False] * len(views) if decodes is None else decodes.begins(grid_hw.prod(axis=1))
    elsewhere = torch.zeros(1, 0 if decodes is None else 3 * patch_px**2, dtype=torch.uint8)
    each: list[Tensor | None] = []
    failures = []
    for number, ((rows, columns), view, here) in enumerate(zip(grid_hw.tolist(), views, mine, strict=True)):
        if not here:
            each.append(elsewhere)
            continue
        data = read(number)
        try:
            each.append(decode_patches(data, (rows, columns), patch_px, view))
        except DataError as error:
            failures.append(f"{name(number)} counts with weight 0: {error}")
            each.append(None)
    return Patches(each, elsewhere.shape[1], sum(mine), tuple(failures))
