"""Debian's openclipart-png as a corpus: some directories are classes, in two folds; the rest is to train."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from cogvit.errors import ConfigError, DataError
from data_pipeline.decode import read_image
from data_pipeline.index import build_index
from tools.demo_corpus import pictograms
from tools.demo_corpus.sample import write_shard

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
LONGEST_PX = 192
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
    """Write indexed shards: out/labeled/fold-N.tar, out/train/clipart-*.tar and pictograms-*.tar."""
    pictures = pictures_of(clipart)
    for fold, members in enumerate(labeled_folds(pictures)):
        _write(out / "labeled" / f"fold-{fold}.tar", members)
    train = unlabeled(pictures)
    order = np.random.default_rng(0).permutation(len(train))
    for number in range(_TRAIN_SHARDS):
        chosen = [train[place] for place in order[number * _IMAGES_PER_SHARD : (number + 1) * _IMAGES_PER_SHARD]]
        _write(out / "train" / f"clipart-{number:05d}.tar", chosen)
    write_shard(out / "train" / "pictograms-00000.tar", pictograms.drawings(0, 0))
    for directory in ("labeled", "train"):
        for _ in build_index(str(out / directory)):
            continue


def _write(path: Path, pictures: list[Picture]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as shard:
        for number, (picture, image) in enumerate(_shrunk(pictures)):
            about: dict[str, object] = {"source": SOURCE, "caption": picture.path.stem.replace("_", " ")}
            about |= {} if picture.label is None else {"label": picture.label}
            shard.write({"__key__": f"{number:05d}", "png": image, "json": json.dumps(about).encode()})


def _shrunk(pictures: list[Picture]) -> Iterator[tuple[Picture, bytes]]:
    """Yield those that decode, on white, with a longer side of at most LONGEST_PX, as PNG."""
    for picture in pictures:
        try:
            image = Image.fromarray(read_image(picture.path.read_bytes()))
        except DataError:
            continue
        image.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "PNG")
        yield picture, data.getvalue()
