"""Held-out samples: what is said of them, and their images as packs. Shards are read through their index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cogvit.batch import PackedImages, SampleRef
from cogvit.errors import DataError
from cogvit.evaluation.ranks import ALONE, Ranks
from cogvit.model.packing import pack_images
from data_pipeline.caption import LANGUAGES, NO_LABEL, Captions
from data_pipeline.decode import Pixels, decode_patches
from data_pipeline.index import Index
from data_pipeline.shards import ShardReader
from data_pipeline.sizing import Sizing

Ints = NDArray[np.int64]

_TOKENS_PER_PACK = 8192


@dataclass(frozen=True)
class Samples:
    """Some samples of one source, in the order of the index."""

    source: str
    index: Index
    rows: Ints  # [n], into the index
    label: Tensor | None  # [n] int64; None unless every sample has one
    captions: dict[str, tuple[tuple[str, ...], ...]]  # of each sample, for the languages that all of them have
    lacking: tuple[str, ...] = ()  # of the other languages that some have: what is missing where

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, chosen: Ints) -> Samples:
        """Return the samples at some places."""
        return replace(
            self,
            rows=self.rows[chosen],
            label=None if self.label is None else self.label[torch.from_numpy(chosen)],
            captions={language: tuple(texts[i] for i in chosen) for language, texts in self.captions.items()},
        )


@dataclass(frozen=True)
class Pack:
    """Images that are encoded together."""

    images: PackedImages
    places: Tensor  # [N] int64, of the images among the rows that were packed
    samples: tuple[SampleRef, ...]
    decoded: Tensor  # [N] bool; the patches of the others are zeros, and their weight is 0


def spread(rows: Ints, limit: int) -> Ints:
    """Return at most `limit` of some rows, evenly spread."""
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def rows_of(index: Index, source: str) -> Ints:
    """Return the rows of a source; none where the index does not have it."""
    return index.rows_of(source) if source in index.sources else np.zeros(0, np.int64)


def unseen(samples: Samples, train: Index) -> Samples:
    """Return the samples whose images are not among the training images, by 128 bits of a hash of their bytes."""
    mine = samples.index.hashes(samples.rows)
    known: set[tuple[int, int]] = set()
    for shard in range(train.corpus.num_shards):
        theirs = train.hashes(train.rows_of_shard(shard))
        known |= set(theirs[np.isin(theirs["content_hash"], mine["content_hash"])].tolist())
    fresh = [number for number, one in enumerate(mine.tolist()) if one not in known]
    return samples if len(fresh) == len(samples) else samples.select(np.array(fresh, np.int64))


def joined_sources(parts: Sequence[Samples], name: str) -> Samples:
    """Return the samples of several sources of one index as those of one, with the languages that all of them have."""
    languages = [language for language in LANGUAGES if all(language in part.captions for part in parts)]
    return Samples(
        name,
        parts[0].index,
        np.concatenate([part.rows for part in parts]),
        None,
        {language: sum((part.captions[language] for part in parts), ()) for language in languages},
    )


def read_captions(index: Index, rows: Ints, caption_field: str = "") -> Iterator[Captions]:
    """Read the captions of some rows; caption_field is data.caption_field. Errors: DataError."""
    reader = ShardReader()
    return (index.corpus.captions(row, reader, caption_field) for row in rows.tolist())


def read_samples(index: Index, source: str, rows: Ints, caption_field: str = "") -> Samples:
    """Read labels and captions of some rows of a source; caption_field is data.caption_field."""
    labels = index.take(rows)["label"]
    captions: dict[str, list[tuple[str, ...]]] = {language: [] for language in LANGUAGES}
    without: dict[str, int] = {}  # the first row of each language that lacks a caption
    for row, found in zip(rows.tolist(), read_captions(index, rows, caption_field), strict=True):
        for language, texts in found.items():
            captions[language] += [texts] if texts else []
            if not texts:
                without.setdefault(language, row)
    lacking = []
    for language, spoken in captions.items():
        if 0 < len(spoken) < len(rows):
            missing = f"{len(rows) - len(spoken)} of {len(rows)} {source} have no caption in {language}"
            lacking.append(f"{missing} ({index.name(int(without[language]))} first); that language is left out")
    return Samples(
        source,
        index,
        rows,
        None if (labels == NO_LABEL).any() else torch.from_numpy(labels.astype(np.int64)),
        {language: tuple(texts) for language, texts in captions.items() if len(texts) == len(rows)},
        tuple(lacking),
    )


def read_images(index: Index, rows: Ints, size_hw_px: Ints) -> Iterator[Pixels | None]:
    """Decode some rows, each at its own (height, width) of size_hw_px [n, 2]; None for one that does not decode."""
    pixels = read_patches(index, rows, size_hw_px, patch_size_px=1)
    for image, size in zip(pixels, size_hw_px.tolist(), strict=True):
        yield None if image is None else image.unflatten(0, size).numpy()


def read_patches(index: Index, rows: Ints, grid_hw: Ints, patch_size_px: int) -> Iterator[Tensor | None]:
    """Decode some rows to patches, uint8 [rows * columns, 3 * P * P], each on its own grid of grid_hw [n, 2].

    None stands for an image that does not decode. Errors: DataError when a shard cannot be read.
    """
    reader = ShardReader()
    for row, (grid_rows, columns) in zip(rows, grid_hw.tolist(), strict=True):
        ref = index.ref(row)
        data = reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
        try:
            yield decode_patches(data, (grid_rows, columns), patch_size_px)
        except DataError:
            yield None


def pack_rows(index: Index, rows: Ints, sizing: Sizing, ranks: Ranks = ALONE) -> Iterator[Pack]:
    """Yield the images of some rows in packs, images of one grid side by side; the sample ids seed their draws.

    ranks: who shares the packs; only this process's are read.
    """
    entries = index.take(rows)
    grid_hw = sizing.grids(entries["height_px"], entries["width_px"])
    order = np.lexsort(grid_hw.T)
    pack = (np.cumsum(grid_hw.prod(axis=1)[order]) - 1) // _TOKENS_PER_PACK
    mine = list(ranks.mine(np.split(order, np.flatnonzero(np.diff(pack)) + 1)))
    quiet = None if ranks.rank == 0 else True  # nothing unless on a terminal
    bar = tqdm(total=sum(map(len, mine)), unit=" images", disable=quiet, leave=False)
    for places in mine:
        chosen, grids = rows[places], grid_hw[places]
        found = list(read_patches(index, chosen, grids, sizing.patch_size_px))
        decoded = torch.tensor([image is not None for image in found])
        images = pack_images(
            [_blank(grid, sizing.patch_size_px) if x is None else x for x, grid in zip(found, grids, strict=True)],
            [(rows, columns) for rows, columns in grids.tolist()],
            key_N=torch.from_numpy(entries["sample_id"][places].copy()),
        )
        images = replace(images, weight=images.weight * decoded)
        yield Pack(images, torch.from_numpy(places), tuple(index.ref(row) for row in chosen), decoded)
        bar.update(len(places))
    bar.close()


def _blank(grid: Ints, patch_size_px: int) -> Tensor:
    return torch.zeros(int(grid.prod()), 3 * patch_size_px**2, dtype=torch.uint8)
