"""Texts in which pictures of the demo corpus stand, each with its caption behind it, and a small model that reads them.

A text is `<|begin_of_image|>`, a token for each patch, `<|end_of_image|>`, the caption and `<|endoftext|>`, and again
for the next picture; captions and their ends are learned. Half of the pictures are digits, half pictograms.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvit import CausalLM, PackedSequence, VisionLanguageModel
from cogvit.model.config import AdapterConfig, MmtpConfig
from cogvit.model.image_input import ImageLimits, image_patches
from cogvit.model.packing import Grid, pack_images
from cogvit.model.sequence import Part, part_positions, tokens_ahead
from cogvit.model.vit import CogViT
from data_pipeline.caption import captions_of, parse_metadata
from data_pipeline.shards import expand_shards, read_members
from tools.make_demo_language_model import tiny_shape, train_tokenizer

TRAIN = "train/{digits,pictograms}-0000{0..1}.tar"
HELD_OUT = "heldout/{digits,pictograms}-00000.tar"
END = "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
PATCH_PX, LEAST_PATCHES, MOST_PATCHES = 8, 16, 36
LIMITS = ImageLimits(PATCH_PX, LEAST_PATCHES * PATCH_PX**2, MOST_PATCHES * PATCH_PX**2)
Document = Sequence[int]  # the numbers of its pictures


@dataclass(frozen=True)
class Words:
    """Ids of the tokens around an image and in its place."""

    begin: int
    image: int
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        """Return those of a tokenizer."""
        return cls(*tokenizer.convert_tokens_to_ids(["<|begin_of_image|>", "<|image|>", "<|end_of_image|>"]))


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures in memory.

    Attributes:
        patches: of each picture, [rows * columns, C]: pixels as uint8, or an encoder's features.
        grids: rows and columns of each.
        texts: ids of each caption and its end.
    """

    patches: list[Tensor]
    grids: list[Grid]
    texts: list[list[int]]

    def save(self, path: Path) -> None:
        """Write them to a safetensors file."""
        tensors = {
            "patches": torch.cat(self.patches),
            "grids": torch.tensor(self.grids),
            "ids": torch.tensor([token for text in self.texts for token in text]),
            "lengths": torch.tensor([len(text) for text in self.texts]),
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Read what `save` wrote."""
        tensors = load_file(path)
        grids = [(rows, columns) for rows, columns in tensors["grids"].tolist()]
        patches = tensors["patches"].split([rows * columns for rows, columns in grids])
        texts = [ids.tolist() for ids in tensors["ids"].split(tensors["lengths"].tolist())]
        return cls([*patches], grids, texts)


@dataclass(frozen=True)
class Shown:
    """A picture of a shard with its caption."""

    data: bytes
    caption: str


@dataclass(frozen=True)
class Laid:
    """Documents as a pack.

    Attributes:
        sequence: of them, with what lies ahead where heads are asked for.
        patches: of their pictures end to end, [T, C].
        grids: rows and columns of each.
    """

    sequence: PackedSequence
    patches: Tensor
    grids: list[Grid]


def read_shown(pattern: str) -> Iterator[Shown]:
    """Yield the pictures of shards with their captions in English and Chinese. Errors: DataError."""
    for shard in expand_shards(pattern):
        sample: dict[str, bytes] = {}  # by the ends of its members' names; json, png and txt in this order
        for member in read_members(shard):
            sample[member.name.rpartition(".")[2]] = member.data
            if member.name.endswith(".png"):
                said = captions_of(parse_metadata(sample["json"], "json"))
                yield Shown(member.data, f"{said['en'][0]}, {said['zh'][0]}")


def make_tokenizer(corpus: Path, directory: Path) -> Any:
    """Train a tokenizer on the captions of the training pictures and write it."""
    tokenizer = train_tokenizer([shown.caption for shown in read_shown(str(corpus / TRAIN))])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def read_pictures(pattern: str, tokenizer: Any, most: int | None = None) -> Pictures:
    """Return pictures of shards as pixels; of each shard at most so many."""
    found = Pictures([], [], [])
    for shard in expand_shards(pattern):
        for number, shown in enumerate(read_shown(shard)):
            if number == most:
                break
            patches, grid = image_patches(Image.open(io.BytesIO(shown.data)).convert("RGB"), LIMITS, PATCH_PX)
            found.patches.append(patches)
            found.grids.append(grid)
            found.texts.append(tokenizer(shown.caption + END, add_special_tokens=False)["input_ids"])
    return found


def new_model(tokenizer: Any, depth: int, vision: CogViT) -> VisionLanguageModel:
    """Return an encoder and a GLM-4 of so many layers, joined by an adapter that keeps every patch."""
    language = CausalLM(replace(tiny_shape(tokenizer), depth=depth))
    adapter = AdapterConfig("glm", spatial_pool=1)
    return VisionLanguageModel.joined(vision, language, tokenizer, adapter, LIMITS.min_pixels, LIMITS.max_pixels)


def features_of(model: VisionLanguageModel, pixels: Pictures, at_once: int = 256) -> Pictures:
    """Return pictures as the encoder's features."""
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pixels.grids), at_once):
            stop = start + at_once
            packed = pack_images(pixels.patches[start:stop], pixels.grids[start:stop])
            encoded_TD = model.vision.forward_packed(packed).patch_TD
            found += encoded_TD.split([rows * columns for rows, columns in pixels.grids[start:stop]])
    return Pictures(found, pixels.grids, pixels.texts)


def draw_documents(count: int, num_pictures: int, generator: torch.Generator) -> list[list[int]]:
    """Return documents of two pictures each."""
    return torch.randint(num_pictures, (count, 2), generator=generator).tolist()


def lay(pictures: Pictures, documents: Sequence[Document], words: Words, mmtp: MmtpConfig | None = None) -> Laid:
    """Return documents end to end, those of a length side by side."""

    def size(document: Document) -> int:
        return sum(2 + len(pictures.patches[one]) + len(pictures.texts[one]) for one in document)

    documents = sorted(documents, key=size)
    ids: list[int] = []
    visual: list[int] = []
    weight: list[float] = []
    positions, row, shown = [], 0, [one for document in documents for one in document]
    for document in documents:
        parts: list[Part] = []
        for one in document:
            tokens, text = len(pictures.patches[one]), pictures.texts[one]
            ids += [words.begin, *[words.image] * tokens, words.end, *text]
            visual += [-1, *range(row, row + tokens), -1, *[-1] * len(text)]
            weight += [*[0.0] * (tokens + 1), *[1.0] * len(text), 0.0]  # of the token that follows
            parts += [1, pictures.grids[one], 1 + len(text)]
            row += tokens
        positions.append(part_positions(parts, by_place=True))
    sequence = PackedSequence(
        ids=torch.tensor(ids),
        position=torch.cat(positions, dim=1).to(torch.int32),
        cu_seqlens=torch.tensor([0, *map(size, documents), 0]).cumsum(0).to(torch.int32),
        visual_row=torch.tensor(visual, dtype=torch.int32),
        labels=torch.tensor([*ids[1:], 0]),
        weight=torch.tensor(weight),
        key=torch.zeros(len(documents), dtype=torch.int64),
    )
    if mmtp is not None and mmtp.depths:
        sequence = replace(sequence, ahead=tokens_ahead(sequence, mmtp, [len(pictures.patches[one]) for one in shown]))
    return Laid(sequence, torch.cat([pictures.patches[one] for one in shown]), [pictures.grids[one] for one in shown])


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(values))
    path.with_suffix(".tmp").replace(path)
