"""Debian's openclipart-png as a corpus: some directories are classes, in two folds; the rest is to train."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from cogvit.errors import ConfigError, DataError
from data_pipeline.decode import read_image
from data_pipeline.index import build_index
from tools.demo_corpus import pictograms

# The classes and the directories whose pictures, with all below them, are theirs.
CLASSES: dict[str, tuple[str, ...]] = {
    "mammals": ("animals/mammals",),
    "birds": ("animals/birds",),
    "bugs": ("animals/bugs",),
    "fruit": ("food/fruit",),
    "desserts": ("food/desserts",),
    "beverages": ("food/beverages",),
    "music": ("recreation/music",),
    "vehicles": ("transportation/vehicles", "transportation/boating"),
    "plants": ("plants",),
    "buildings": ("buildings",),
    "computers": ("computer/hardware",),
    "clothing": ("people/clothing",),
    "tools": ("tools",),
}
SOURCE = "clipart"
FOLDS = 2
LONGEST_PX = 128
VIEWS = 6  # of a picture to train on: the whole, and parts of it
_SMALLEST_VIEW = 0.35  # of the area
_WIDEST_VIEW = 1.3  # of the picture's aspect
_MOST_OF_A_DIRECTORY = 300  # to train on: one has 1,378 stars
_IMAGES_PER_SHARD = 1000
_TRAIN_SHARDS = 3


@dataclass(frozen=True)
class Picture:
    """A file of the collection."""

    path: Path
    label: int | None  # a place in CLASSES
    series: str  # what files of one drawing, numbered or without its colors, have in common


def series_of(stem: str) -> str:
    """Return a file's name without numbers, separators and the mark of black and white."""
    return re.sub(r"_bw(?=_|$)|[\W\d_]", "", stem.lower())


def pictures_of(directory: Path) -> list[Picture]:
    """Return the files of the collection, links left out. Errors: ConfigError when there are none."""
    label_of = {top: place for place, tops in enumerate(CLASSES.values()) for top in tops}
    found = []
    for path in sorted(directory.rglob("*.png")):
        if not path.is_symlink():
            parents = [str(parent) for parent in path.relative_to(directory).parents]
            label = next((label_of[parent] for parent in parents if parent in label_of), None)
            found.append(Picture(path, label, series_of(path.stem)))
    if not found:
        raise ConfigError(f"--clipart {directory} has no pictures; apt-get install openclipart-png")
    return found


def labeled_folds(pictures: Iterable[Picture]) -> list[list[Picture]]:
    """Return the pictures with a class, all of one series in the same fold."""
    folds: list[list[Picture]] = [[] for _ in range(FOLDS)]
    for picture in pictures:
        if picture.label is not None:
            folds[zlib.crc32(picture.series.encode()) % FOLDS].append(picture)
    return folds


def unlabeled(pictures: list[Picture]) -> list[Picture]:
    """Return what may be trained on: nothing of a labeled series and no copy of a labeled file."""
    series = {picture.series for picture in pictures if picture.label is not None}
    copies = {picture.path.read_bytes() for picture in pictures if picture.label is not None}
    taken: dict[Path, int] = {}
    chosen = []
    for picture in pictures:
        if picture.label is None and picture.series not in series and picture.path.read_bytes() not in copies:
            taken[picture.path.parent] = taken.get(picture.path.parent, 0) + 1
            if taken[picture.path.parent] <= _MOST_OF_A_DIRECTORY:
                chosen.append(picture)
    return chosen


def make_corpus(clipart: Path, out: Path) -> None:
    """Write indexed shards: out/labeled/fold-N.tar, out/train/clipart-*.tar and pictograms-*.tar.

    Training sees VIEWS of each picture; they lie in the shards, so that a teacher needs to see them once only.
    """
    pictures = pictures_of(clipart)
    for fold, members in enumerate(labeled_folds(pictures)):
        named = (({"source": SOURCE, "label": picture.label}, image) for picture, image in _decoded(members))
        _write(out / "labeled" / f"fold-{fold}.tar", named)
    train, rng = unlabeled(pictures), np.random.default_rng(0)
    order = rng.permutation(len(train))
    for number in range(_TRAIN_SHARDS):
        chosen = [train[place] for place in order[number * _IMAGES_PER_SHARD : (number + 1) * _IMAGES_PER_SHARD]]
        seen = (({"source": SOURCE}, view) for _, image in _decoded(chosen) for view in views_of(image, rng))
        _write(out / "train" / f"clipart-{number:05d}.tar", seen)
    drawn = pictograms.drawings(0, 0)
    seen = (({"source": sample.source}, view) for sample in drawn for view in views_of(sample.image, rng))
    _write(out / "train" / "pictograms-00000.tar", seen)
    for directory in ("labeled", "train"):
        for _ in build_index(str(out / directory)):
            continue


def views_of(image: Image.Image, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield VIEWS: the whole picture, then parts of it, at least _SMALLEST_VIEW of its area, half of them mirrored."""
    yield image
    width_px, height_px = image.size
    for _ in range(VIEWS - 1):
        side = rng.uniform(_SMALLEST_VIEW, 1.0) ** 0.5
        aspect = _WIDEST_VIEW ** rng.uniform(-0.5, 0.5)
        w_px, h_px = (
            min(whole_px, max(1, round(whole_px * side * stretch)))
            for whole_px, stretch in ((width_px, aspect), (height_px, 1 / aspect))
        )
        left_px, top_px = int(rng.integers(width_px - w_px + 1)), int(rng.integers(height_px - h_px + 1))
        part = image.crop((left_px, top_px, left_px + w_px, top_px + h_px))
        yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def _decoded(pictures: Iterable[Picture]) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield those that decode, on white."""
    for picture in pictures:
        try:
            yield picture, Image.fromarray(read_image(picture.path.read_bytes()))
        except DataError:
            continue


def _write(path: Path, images: Iterable[tuple[Mapping[str, object], Image.Image]]) -> None:
    """Write a shard of PNGs whose longer side is at most LONGEST_PX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as shard:
        for number, (about, image) in enumerate(images):
            small, data = image.convert("RGB"), io.BytesIO()
            small.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
            small.save(data, "PNG")
            shard.write({"__key__": f"{number:05d}", "png": data.getvalue(), "json": json.dumps(about).encode()})
