"""Pictures of what an encoder sees and finds, as PNG bytes for a report. Samples are evenly spread, not picked."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cogvit.batch import to_device
from cogvit.evaluation.features import embed_images, embed_texts, image_features
from cogvit.evaluation.samples import Samples, pack_rows, read_images, spread
from cogvit.evaluation.subject import Subject
from data_pipeline.decode import Pixels

_NUM_MAPPED = 8  # images beside their features
_NUM_QUERIES = 4  # in each language and direction
_NUM_ANSWERS = 5
_CELL_PX = 240
_NUM_COLUMNS = 4  # of the sheet, so that a phone shows cells that can be looked at
_GAP_PX = 8
_TILE_PX = 96
_COLOR_QUANTILE = 0.02  # of the patches lie beyond each end of a color channel


@dataclass(frozen=True)
class Item:
    """A query or an answer: a caption, an image or both."""

    caption: str
    png: bytes | None = None
    right: bool = False  # as an answer


@dataclass(frozen=True)
class Example:
    """A query and the answers most similar to it, best first."""

    query: Item
    answers: tuple[Item, ...]


@torch.inference_mode()
def feature_picture(subject: Subject) -> bytes:
    """Draw some held-out images above their patch features, whose first three principal components are the color."""
    index, vision = subject.heldout, subject.towers.vision
    rows = spread(index.rows_of(), _NUM_MAPPED)
    features: dict[int, Tensor] = {}
    for pack in pack_rows(index, rows, subject.sizing):
        patch_TD = vision.forward_packed(to_device(pack.images, vision.mask_token.device)).patch_TD.cpu()
        lengths = pack.images.grid_hw.prod(dim=1).tolist()
        features |= dict(zip(pack.places.tolist(), patch_TD.split(lengths), strict=True))
    patches = [features[place] for place in range(len(rows))]
    colors = principal_colors(torch.cat(patches)).split([len(x) for x in patches])
    entries = index.take(rows)
    grid_hw = subject.sizing.grids(entries["height_px"], entries["width_px"])
    size_hw_px = grid_hw * subject.sizing.patch_size_px
    found = read_images(index, rows, size_hw_px)
    images = [_gray(size) if image is None else image for image, size in zip(found, size_hw_px.tolist(), strict=True)]
    fields = [color.unflatten(0, grid).numpy() for color, grid in zip(colors, grid_hw.tolist(), strict=True)]
    return _png(_sheet([(_cell(image), _cell(field)) for image, field in zip(images, fields, strict=True)]))


def principal_colors(x: Tensor) -> Tensor:
    """Return the first three principal components of vectors [n, D] as colors, uint8 [n, 3]."""
    x = x - x.mean(dim=0)
    axis = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    largest = axis.gather(1, axis.abs().argmax(dim=1, keepdim=True))
    component = F.pad(x @ (axis * largest.sign()).T, (0, 3 - len(axis)))
    low, high = (component.quantile(q, dim=0) for q in (_COLOR_QUANTILE, 1 - _COLOR_QUANTILE))
    return ((component - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).round().to(torch.uint8)


def retrieval_examples(subject: Subject) -> list[Example]:
    """Return some captions with the images found for them, then some images with the captions found for them.

    From the source with the most captioned samples; for stage 2.
    """
    samples = max(subject.captioned, key=len)
    image = embed_images(subject, image_features(subject.towers.vision, samples, subject.sizing))
    queries = spread(np.arange(len(samples)), _NUM_QUERIES + 2)[1:-1].tolist()
    by_caption, by_image = [], []
    for several in samples.captions.values():
        captions = tuple(own[0] for own in several)
        distinct = list(dict.fromkeys(captions))
        text = embed_texts(subject, distinct)
        by_caption += [
            _images_of(samples, captions, text[distinct.index(captions[own])], image, own) for own in queries
        ]
        by_image += [_captions_of(samples, captions[own], distinct, image[own], text, own) for own in queries]
    return by_caption + by_image


def _images_of(samples: Samples, captions: tuple[str, ...], query: Tensor, gallery: Tensor, own: int) -> Example:
    found = _best(query, gallery)
    answers = zip(found, _tiles(samples, found), strict=True)
    return Example(
        Item(captions[own]),
        tuple(Item(captions[place], png, right=captions[place] == captions[own]) for place, png in answers),
    )


def _captions_of(
    samples: Samples, caption: str, distinct: list[str], query: Tensor, gallery: Tensor, own: int
) -> Example:
    answers = (distinct[place] for place in _best(query, gallery))
    return Example(
        Item(caption, _tiles(samples, [own])[0]), tuple(Item(text, right=text == caption) for text in answers)
    )


def _best(query: Tensor, gallery: Tensor) -> list[int]:
    return (gallery @ query).topk(min(_NUM_ANSWERS, len(gallery))).indices.tolist()


def _tiles(samples: Samples, places: list[int]) -> list[bytes]:
    rows = samples.rows[places]
    entries = samples.index.take(rows)
    size_hw_px = np.stack([entries["height_px"], entries["width_px"]], axis=1).astype(np.int64)
    shrink = np.minimum(1.0, _TILE_PX / size_hw_px.max(axis=1, keepdims=True))
    size_hw_px = np.maximum(1, (size_hw_px * shrink).round().astype(np.int64))
    images = zip(read_images(samples.index, rows, size_hw_px), size_hw_px.tolist(), strict=True)
    return [_png(Image.fromarray(_gray(size) if image is None else image)) for image, size in images]


def _gray(size_hw_px: list[int]) -> Pixels:
    """What stands for an image that does not decode."""
    return np.full((*size_hw_px, 3), 128, np.uint8)


def _cell(pixels: Pixels) -> Image.Image:
    """Scale an image or a field of patches to the size of a cell, each pixel or patch a plain rectangle."""
    image = Image.fromarray(pixels)
    scale = _CELL_PX / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)


def _sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Lay images in rows of a few and each row's fields below it, on white."""
    pitch_px = _CELL_PX + _GAP_PX
    num_columns, num_bands = min(len(pairs), _NUM_COLUMNS), -(-len(pairs) // _NUM_COLUMNS)
    sheet = Image.new("RGB", (num_columns * pitch_px - _GAP_PX, 2 * num_bands * pitch_px - _GAP_PX), "white")
    for number, pair in enumerate(pairs):
        band, column = divmod(number, _NUM_COLUMNS)
        for row, cell in enumerate(pair, start=2 * band):
            left, top = column * pitch_px + (_CELL_PX - cell.width) // 2, row * pitch_px + (_CELL_PX - cell.height) // 2
            sheet.paste(cell, (left, top))
    return sheet


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
