"""Random microbatches for tests: ragged packs with absent slots and padding, captions and teacher targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cogvit.batch import Batch, HostView, PackedImages, PackedSequence, PackedText, SharpImages, TeacherTargets
from cogvit.draws import mix
from cogvit.model.packing import Grid
from cogvit.model.sequence import Part, expert_tokens, part_positions
from cogvit.model.sequence import num_tokens as part_tokens
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


Shown = Literal["mixed", "text", "images", "nothing"]  # what is in a pack of stage 3


def no_images(*, num_tokens: int = 96, num_slots: int = 8, patch_px: int = 8) -> PackedImages:
    """A pack of images that is all padding."""
    return PackedImages(
        patches=torch.zeros(num_tokens, 3 * patch_px**2, dtype=torch.uint8),
        row_col=torch.zeros(num_tokens, 2, dtype=torch.int32),
        cu_seqlens=_int32([0] * (num_slots + 1) + [num_tokens]),
        grid_hw=torch.zeros(num_slots, 2, dtype=torch.int32),
        key=torch.zeros(num_slots, dtype=torch.int64),
        weight=torch.zeros(num_slots),
        host=HostView((0,) * num_slots + (num_tokens,), ((0, 0),) * num_slots),
    )


def random_sequence(
    seed: int,
    samples: Sequence[Sequence[Part]],
    *,
    num_tokens: int = 96,
    num_slots: int = 6,
    vocab_size: int = 288,
    by_place: bool = True,
    framed: bool = False,
) -> PackedSequence:
    """A pack of samples, each of texts and images' grids in visual tokens, in the order of the images' pack.

    framed: learned tokens stand around images, whose tokens go through the visual experts.
    """
    g = torch.Generator().manual_seed(seed)
    positions, rows, lengths, seen = [torch.zeros(3, 0, dtype=torch.int64)], [], [], 0
    experts = [torch.zeros(0, dtype=torch.bool)]
    for parts in samples:
        positions.append(part_positions(parts, by_place=by_place, framed=framed))
        experts.append(expert_tokens(parts, framed=framed))
        lengths.append(positions[-1].shape[1])
        for part in parts:
            if isinstance(part, int):
                rows += [-1] * part
            else:
                size = part_tokens(part, framed=framed)
                rows += range(seen, seen + size)
                seen += size
    padding, absent = num_tokens - len(rows), num_slots - len(samples)
    bounds = torch.tensor([0, *lengths, *[0] * absent, padding]).cumsum(0)
    ids, weight = torch.randint(4, vocab_size, (num_tokens,), generator=g), torch.rand(num_tokens, generator=g)
    visual_row = _int32(rows + [-1] * padding)
    weight = torch.where(visual_row < 0, weight.mul(2).round().mul(weight), 0.0)  # a quarter has none
    weight[bounds[1:-1] - 1] = 0.0
    weight[len(rows) :] = 0.0
    expert = torch.cat([*experts, torch.zeros(padding, dtype=torch.bool)]) if framed else None
    labels, owned = int((weight > 0).sum()), None if expert is None else int(expert.sum())
    return PackedSequence(
        ids=torch.where(visual_row < 0, ids, 3),
        position=torch.cat([*positions, torch.zeros(3, padding, dtype=torch.int64)], dim=1).to(torch.int32),
        cu_seqlens=bounds.to(torch.int32),
        visual_row=visual_row,
        labels=ids.roll(-1),
        weight=weight,
        key=mix(torch.arange(num_slots) + 1000 * seed, 11),
        host=HostView((*lengths, *[0] * absent, padding), labels=labels, experts=owned),
        expert=expert,
    )


def joint_batch(seed: int, shown: Shown, *, by_place: bool, framed: bool = False, sharp_patches: int = 0) -> Batch:
    """A microbatch of stage 3 with 8-px patches, merged 2 x 2: samples with several images, one, and none.

    sharp_patches: of each image as a second encoder sees it.
    """
    with_images = shown in ("mixed", "images")
    images = random_images(seed) if with_images else no_images()
    grids: list[Grid] = [(-(-rows // 2), -(-columns // 2)) for rows, columns in images.grid_hw.tolist() if rows]
    samples: dict[Shown, list[list[Part]]] = {
        "mixed": [[4, *grids[:1], 5, *grids[1:2], 7], [11], [*grids[2:], 6]],
        "text": [[13], [1], [20], [13]],
        "images": [[grid, 1] for grid in grids[:5]],
        "nothing": [],
    }
    sequence = random_sequence(seed, samples[shown], by_place=by_place, framed=framed)
    sharp = None
    if sharp_patches:
        count = [sum(not isinstance(part, int) for part in parts) for parts in samples[shown]]
        g = torch.Generator().manual_seed(seed + 100)
        patches = torch.randint(0, 256, (sum(count) * sharp_patches, 3 * 8**2), generator=g).to(torch.uint8)
        sharp = SharpImages(patches, (*count, *[0] * (len(sequence.key) - len(count))))
    return Batch(images, None, None, (None,) * images.num_slots, sequence, sharp=sharp)


def _int32(values: list[int] | list[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
