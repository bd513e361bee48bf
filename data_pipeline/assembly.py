"""Packs put together: images and captions end to end, with what the host will need to know of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import HostView, PackedImages, PackedText
from cogvit.model.tokenizer import CaptionTokens
from data_pipeline.balance import PackLimits
from data_pipeline.caption import caption_id

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spoken:
    """The caption that was chosen for a sample, and the hash of all that the sample has."""

    text: str
    concept_id: int


def assemble_images(
    patches: list[Tensor | None], grid_hw: Ints, key: Ints, patch_bytes: int, limits: PackLimits
) -> PackedImages:
    """Lay images end to end in one pack; None stands for one that did not decode and weighs 0."""
    absent, lengths = limits.images - len(patches), grid_hw.prod(axis=1)
    num_rows = limits.rows(int(lengths.sum()), limits.tokens)
    bounds = _bounds(lengths, limits.images, num_rows)
    packed = torch.zeros(num_rows, patch_bytes, dtype=torch.uint8)
    for number, image in enumerate(patches):
        if image is not None:
            packed[bounds[number] : bounds[number + 1]] = image
    row_col = np.zeros((num_rows, 2), np.int32)
    row_col[: bounds[-2]] = np.stack(np.divmod(_places(lengths), np.repeat(grid_hw[:, 1], lengths)), axis=1)
    return PackedImages(
        patches=packed,
        row_col=torch.from_numpy(row_col),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        grid_hw=torch.from_numpy(np.pad(grid_hw, ((0, absent), (0, 0))).astype(np.int32)),
        key=torch.from_numpy(np.pad(key, (0, absent))),
        weight=torch.tensor([float(image is not None) for image in patches] + [0.0] * absent),
        host=_host_view(bounds, grid_hw),
    )


def assemble_text(
    captions: list[Spoken], tokens: list[CaptionTokens], weight_N: Tensor, limits: PackLimits
) -> PackedText:
    """Lay captions end to end in the slots of their images; weight_N is the images'."""
    lengths = np.array([len(one.ids) for one in tokens], np.int64)
    bounds = _bounds(lengths, limits.images, limits.rows(int(lengths.sum()), limits.text_tokens))
    padding, absent = bounds[-1] - bounds[-2], limits.images - len(captions)
    ids = np.concatenate([*(one.ids for one in tokens), np.zeros(padding, np.int64)])
    return PackedText(
        ids=torch.from_numpy(ids),
        position=torch.from_numpy(np.pad(_places(lengths), (0, padding)).astype(np.int32)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        caption_id=torch.tensor([caption_id(one) for one in tokens] + [0] * absent),
        concept_id=torch.tensor([caption.concept_id for caption in captions] + [0] * absent),
        weight=weight_N.clone(),
        host=_host_view(bounds),
    )


def _bounds(lengths: Ints, num_slots: int, total: int) -> Ints:
    """Return the segments' bounds: the given ones, empty ones up to num_slots, and the padding up to total."""
    used = np.cumsum(np.pad(lengths, (1, num_slots - len(lengths))))
    return np.append(used, total)


def _host_view(bounds: Ints, grid_hw: Ints | None = None) -> HostView:
    """Return what the host knows of a pack with these bounds and the grids of its images."""
    absent = [] if grid_hw is None else [(0, 0)] * (len(bounds) - 2 - len(grid_hw))
    grids = [] if grid_hw is None else grid_hw.tolist()
    return HostView(tuple(np.diff(bounds).tolist()), (*((rows, columns) for rows, columns in grids), *absent))


def _places(lengths: Ints) -> Ints:
    """Return each token's place inside its own segment."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
