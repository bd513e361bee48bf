"""Random microbatches for tests: ragged packs with absent slots and padding, captions and teacher targets."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvit.batch import Batch, HostView, PackedImages, PackedText, TeacherTargets
from cogvit.draws import mix
from cogvit.objective.masking import mask_tokens
from cogvit.teacher.stream import is_summary

MASK_RATIO = 0.35


def random_images(seed: int, *, num_tokens: int = 96, num_slots: int = 8, patch_px: int = 8) -> PackedImages:
    """A pack of images of 2 to 4 patches a side; the slots that do not fit and the last one are absent."""
    g = torch.Generator().manual_seed(seed)
    grids: list[tuple[int, int]] = []
    for rows, columns in torch.randint(2, 5, (num_slots - 1, 2), generator=g).tolist():
        if sum(r * c for r, c in grids) + rows * columns <= num_tokens:
            grids.append((rows, columns))
    places = [(row, column) for rows, columns in grids for row in range(rows) for column in range(columns)]
    bounds = [0, *torch.tensor([r * c for r, c in grids]).cumsum(0).tolist()]
    absent = num_slots - len(grids)
    return PackedImages(
        patches=torch.randint(0, 256, (num_tokens, 3 * patch_px**2), generator=g).to(torch.uint8),
        row_col=_int32(places + [(0, 0)] * (num_tokens - len(places))),
        cu_seqlens=_int32(bounds + [bounds[-1]] * absent + [num_tokens]),
        grid_hw=_int32(grids + [(0, 0)] * absent),
        key=mix(torch.arange(num_slots) + 1000 * seed, 7),
        weight=torch.tensor([1.0] * len(grids) + [0.0] * absent),
        host=HostView(
            (*(r * c for r, c in grids), *[0] * absent, num_tokens - bounds[-1]), (*grids, *[(0, 0)] * absent)
        ),
    )


def random_text(seed: int, images: PackedImages, *, num_tokens: int = 80, vocab_size: int = 384) -> PackedText:
    """One caption of 3 to 11 tokens for every image that is there; some captions are equal."""
    g = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(3, 12, (), generator=g)) * int(weight) for weight in images.weight]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist(), num_tokens]
    position = [i for length in lengths for i in range(length)]
    return PackedText(
        ids=torch.randint(0, vocab_size, (num_tokens,), generator=g),
        position=_int32(position + [0] * (num_tokens - len(position))),
        cu_seqlens=_int32(bounds),
        caption_id=torch.randint(0, 10, (images.num_slots,), generator=g),
        concept_id=torch.randint(0, 20, (images.num_slots,), generator=g),
        weight=images.weight.clone(),
        host=HostView((*lengths, num_tokens - sum(lengths))),
    )


def random_batch(seed: int, teacher_dims: dict[str, int]) -> Batch:
    """A microbatch of both stages."""
    images = random_images(seed)
    g = torch.Generator().manual_seed(seed)
    masked = int(mask_tokens(images, MASK_RATIO).sum())
    rows = {name: int((images.grid_hw[:, 0] > 0).sum()) if is_summary(name) else masked for name in teacher_dims}
    features = {name: torch.randn(rows[name], dim, generator=g) for name, dim in teacher_dims.items()}
    return Batch(images, random_text(seed, images), TeacherTargets(features), (None,) * images.num_slots)


def _int32(values: list[int] | list[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
