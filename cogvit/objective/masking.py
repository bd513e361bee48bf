"""Which patches stage 1 masks: an exact share of every image, drawn from the image's own key.

Source: paper section 2.1 (35 %). The reference draws each patch by a coin; an exact count keeps the load equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvit.batch import PackedImages
from cogvit.draws import mix

_MASK_SALT = 0x6D61736B  # "mask"


def num_masked(num_patches: int, ratio: float) -> int:
    """Return ratio * num_patches, rounded half up."""
    return int(num_patches * ratio + 0.5)


def mask_tokens(images: PackedImages, ratio: float) -> Tensor:
    """Return a bool [T] mask: the lowest hash scores of each image; padding is never masked."""
    slot_T = images.segment()
    index_T = torch.arange(images.num_tokens, device=slot_T.device)
    start_T = images.cu_seqlens.to(torch.int64)[slot_T]
    key_T = torch.cat([images.key, images.key.new_zeros(1)])[slot_T]
    score_T = mix(key_T, _MASK_SALT, index_T - start_T)
    by_score = torch.argsort(score_T, stable=True)
    order = by_score[torch.argsort(slot_T[by_score], stable=True)]
    rank_T = torch.empty_like(index_T)
    rank_T[order] = index_T - start_T[order]
    length_S = images.cu_seqlens.to(torch.int64).diff()
    quota_S = torch.floor(length_S.to(torch.float64) * ratio + 0.5).to(torch.int64)
    quota_S[-1] = 0  # the padding segment
    return rank_T < quota_S[slot_T]


def rows_of(mask_T: Tensor, images: PackedImages, ratio: float) -> Tensor:
    """Return the rows [M] int64 where a mask of `mask_tokens` is true; the host knows how many without asking."""
    if images.host is None:
        return mask_T.nonzero().squeeze(1)
    count = sum(num_masked(length, ratio) for length in images.host.lengths[:-1])
    return torch.nonzero_static(mask_T, size=count).squeeze(1)


def mask_image(key: int, num_patches: int, ratio: float) -> Tensor:
    """Return the bool [num_patches] mask of one image, equal to its part of `mask_tokens`."""
    score = mix(torch.tensor(key, dtype=torch.int64), _MASK_SALT, torch.arange(num_patches))
    mask = torch.zeros(num_patches, dtype=torch.bool)
    mask[torch.argsort(score, stable=True)[: num_masked(num_patches, ratio)]] = True
    return mask
