"""What stage 3 is measured beside: a loop of transformers' language model and torch's AdamW that pads its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from cogvit.batch import Batch, PackedImages
from cogvit.model.adapter import PatchGroups
from cogvit.model.packing import Grid, pack_images
from cogvit.model.vit import CogViT, grids_of


@dataclass(frozen=True)
class Sample:
    """A sample of a pack, by itself."""

    ids: Tensor  # [n] int64
    visual: Tensor  # [n] bool, where an image's tokens stand
    labels: Tensor  # [n] int64
    weight: Tensor  # [n]
    patches: tuple[Tensor, ...]  # of each image, [rows * columns, 3 * P * P] uint8
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class PaddedBatch:
    """B samples as rows of S tokens, S those of the longest; their images end to end in the order of the rows."""

    images: PackedImages | None  # where there are any
    ids_BS: Tensor
    visual_BS: Tensor
    valid_BS: Tensor
    labels_BS: Tensor
    answer_BS: Tensor  # bool, where a label counts


def samples_of(batch: Batch, spatial_pool: int) -> list[Sample]:
    """Return the samples of a pack in its order."""
    sequence, grids = batch.sequence, grids_of(batch.images)
    assert sequence is not None and sequence.host is not None
    sizes = [rows * columns for rows, columns in grids]
    patches = batch.images.patches[: sum(sizes)].split(sizes)
    image_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes) // spatial_pool**2)
    found, start = [], 0
    for length in sequence.host.lengths[:-1]:
        here = slice(start, start := start + length)
        rows = sequence.visual_row[here]
        images = image_of_row[rows[rows >= 0].long()].unique_consecutive().tolist()
        own = (sequence.ids[here], rows >= 0, sequence.labels[here], sequence.weight[here])
        pictures = tuple(patches[image] for image in images), tuple(grids[image] for image in images)
        found += [Sample(*own, *pictures)] if length else []
    return found


def padded(samples: Sequence[Sample]) -> PaddedBatch:
    """Pad samples to the longest of them."""

    def rows(of_samples: list[Tensor]) -> Tensor:
        return pad_sequence(of_samples, batch_first=True)

    patches = [image for sample in samples for image in sample.patches]
    grids = [grid for sample in samples for grid in sample.grids]
    return PaddedBatch(
        images=pack_images(patches, grids) if patches else None,
        ids_BS=rows([sample.ids for sample in samples]),
        visual_BS=rows([sample.visual for sample in samples]),
        valid_BS=rows([torch.ones(len(sample.ids), dtype=torch.int64) for sample in samples]),
        labels_BS=rows([sample.labels for sample in samples]),
        answer_BS=rows([sample.weight > 0 for sample in samples]),
    )


class BareModel(nn.Module):
    """Our plain encoder and adapter, which know no padding, before transformers' language model, which does."""

    def __init__(self, vision: CogViT, adapter: PatchGroups, language: Path) -> None:
        super().__init__()
        self.vision, self.adapter = vision, adapter
        self.language = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32, attn_implementation="sdpa")

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return the sum of the cross entropies of the labels that count; the head reads no other place."""
        x_BSD = self.language.get_input_embeddings()(batch.ids_BS)
        if batch.images is not None:
            patch_TD = self.vision.forward_packed(batch.images).patch_TD
            visual_ED = self.adapter.forward_packed(patch_TD, grids_of(batch.images))
            x_BSD = x_BSD.masked_scatter(batch.visual_BS.unsqueeze(2), visual_ED)
        hidden_BSD = self.language.model(
            inputs_embeds=x_BSD, attention_mask=batch.valid_BS, use_cache=False
        ).last_hidden_state
        logits = self.language.get_output_embeddings()(hidden_BSD[batch.answer_BS])
        return F.cross_entropy(logits, batch.labels_BS[batch.answer_BS], reduction="sum")


def bare_step(model: BareModel, optimizer: torch.optim.Optimizer, micro: Sequence[PaddedBatch]) -> None:
    """Accumulate the microbatches, clip, update."""
    labels = sum(int(batch.answer_BS.sum()) for batch in micro)
    for batch in micro:
        (model(batch) / labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def bare_loss(model: BareModel, micro: Sequence[PaddedBatch]) -> float:
    """Return nats a label."""
    total = sum(float(model(batch)) for batch in micro)
    return total / sum(int(batch.answer_BS.sum()) for batch in micro)
