"""Crops of the photographs that come inside the scikit-image wheel: those in the public domain or under CC0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image

from tools.demo_corpus.sample import Sample

SOURCE = "photos"
_DIRECTORY = files("skimage") / "data"
_GRIDS = ((6, 6), (6, 8), (8, 6), (8, 8), (6, 10), (10, 6), (8, 12), (12, 8), (10, 10))  # rows, columns of 8 px
_PATCH_PX = 8


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph of scikit-image and what it shows."""

    file: str
    en: str
    zh: str


PHOTOS = (
    Photo("astronaut.png", "an astronaut", "一位宇航员"),
    Photo("brick.png", "a brick wall", "一面砖墙"),
    Photo("camera.png", "a man with a camera", "一个拿相机的人"),
    Photo("cell.png", "a cell", "一个细胞"),
    Photo("chelsea.png", "a cat", "一只猫"),
    Photo("clock_motion.png", "a wall clock", "一个挂钟"),
    Photo("coffee.png", "a cup of coffee", "一杯咖啡"),
    Photo("coins.png", "old coins", "古钱币"),
    Photo("grass.png", "grass", "草地"),
    Photo("gravel.png", "gravel", "碎石"),
    Photo("hubble_deep_field.jpg", "galaxies in deep space", "深空中的星系"),
    Photo("ihc.png", "stained tissue", "染色的组织"),
    Photo("microaneurysms.png", "blood vessels of an eye", "眼睛的血管"),
    Photo("retina.jpg", "a retina", "一个视网膜"),
    Photo("rocket.jpg", "a rocket launch", "火箭发射"),
)


def crop(photo: Image.Image, shows: Photo, key: str, rng: np.random.Generator) -> Sample:
    """Cut a random part of a photograph and scale it to a canvas of 36 to 100 patches of 8 px."""
    rows, columns = _GRIDS[rng.integers(len(_GRIDS))]
    width_px, height_px = columns * _PATCH_PX, rows * _PATCH_PX
    scale = rng.uniform(0.5, 1.0) * min(photo.width / width_px, photo.height / height_px)
    crop_width_px, crop_height_px = round(width_px * scale), round(height_px * scale)
    x = int(rng.integers(photo.width - crop_width_px + 1))
    y = int(rng.integers(photo.height - crop_height_px + 1))
    box = (x, y, x + crop_width_px, y + crop_height_px)
    image = photo.resize((width_px, height_px), Image.Resampling.BICUBIC, box)
    return Sample(key, image, "jpg", SOURCE, f"a photo of {shows.en}", f"{shows.zh}的照片")


def crops(seed: int, count: int) -> Iterator[Sample]:
    """Take `count` crops of every photograph, one of each in turn."""
    opened = [Image.open(str(_DIRECTORY / photo.file)).convert("RGB") for photo in PHOTOS]
    for number in range(count):
        for i, (image, photo) in enumerate(zip(opened, PHOTOS, strict=True)):
            key = f"{photo.file.split('.')[0]}_{number:03d}"
            yield crop(image, photo, key, np.random.default_rng((seed, number, i)))
