"""Held-out samples: what is said of them, and their images as packs. Shards are read through their index."""

from __future__ import annotations

from collections.abc import Iterator
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
from data_pipeline.caption import LANGUAGES, NO_LABEL, captions_of
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


def spread(rows: Ints, limit: int) -> Ints:
    """Return at most `limit` of some rows, evenly spread."""
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def rows_of(index: Index, source: str) -> Ints:
    """Return the rows of a source; none where the index does not have it."""
    return index.rows_of(source) if source in index.sources else np.zeros(0, np.int64)


def read_samples(index: Index, source: str, rows: Ints) -> Samples:
    """Read labels and captions of some rows of a source."""
    reader, labels = ShardReader(), index.take(rows)["label"]
    captions: dict[str, list[tuple[str, ...]]] = {language: [] for language in LANGUAGES}
    for row in rows.tolist():
        for language, texts in captions_of(index.corpus.metadata(row, reader)).items():
            captions[language] += [texts] if texts else []
    return Samples(
        source,
        index,
        rows,
        None if (labels == NO_LABEL).any() else torch.from_numpy(labels.astype(np.int64)),
        {language: tuple(texts) for language, texts in captions.items() if len(texts) == len(rows)},
    )


def read_images(index: Index, rows: Ints, size_hw_px: Ints) -> Iterator[Pixels]:
    """Decode some rows, each at its own (height, width) of size_hw_px [n, 2]. Errors: as `read_patches`."""
    pixels = read_patches(index, rows, size_hw_px, patch_size_px=1)
    return (image.unflatten(0, size).numpy() for image, size in zip(pixels, size_hw_px.tolist(), strict=True))


def read_patches(index: Index, rows: Ints, grid_hw: Ints, patch_size_px: int) -> Iterator[Tensor]:
    """Decode some rows to patches, uint8 [rows * columns, 3 * P * P], each on its own grid of grid_hw [n, 2].

    Errors: DataError, which names the sample, where one does not decode.
    """
    reader = ShardReader()
    for row, (grid_rows, columns) in zip(rows, grid_hw.tolist(), strict=True):
        ref = index.ref(row)
        data = reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
        try:
            yield decode_patches(data, (grid_rows, columns), patch_size_px)
        except DataError as error:
            raise DataError(f"{index.name(row)}: {error}; evaluation takes whole shards: remove or repair it") from None


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
        images = pack_images(
            list(read_patches(index, chosen, grids, sizing.patch_size_px)),
            [(rows, columns) for rows, columns in grids.tolist()],
            key_N=torch.from_numpy(entries["sample_id"][places].copy()),
        )
        yield Pack(images, torch.from_numpy(places), tuple(index.ref(row) for row in chosen))
        bar.update(len(places))
    bar.close()
