"""How an encoder's images are prepared, as its training prepared them, and a user's images as packs of patches.

An export says it in preprocessor_config.json, so that a notebook sees what training saw, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvit.batch import PackedImages
from cogvit.errors import CheckpointError, DataError
from cogvit.model.config import CogViTConfig
from cogvit.model.images import ImageLike, Source, decode_size, sources_of
from cogvit.model.naflex import naflex_grid, resize_to_grid
from cogvit.model.packing import Grid, pack_images, patchify

_BILINEAR = 2  # Pillow's number of the filter, which transformers' processors store
_HALF = [0.5, 0.5, 0.5]  # mean and deviation that bring [0, 1] to [-1, 1]


@dataclass(frozen=True)
class Preprocessing:
    """How images become patches; the resize is always bilinear and antialiased, and values are brought to [-1, 1].

    Attributes:
        max_patches: the most patches of an image.
        square: every image becomes a square of the encoder's image_size; otherwise it keeps its aspect (NaFlex).
        enlarge: an image with fewer patches than the budget is enlarged to it.
        multiple: rows and columns of a grid are multiples of it.

    Errors: ValueError when a number is not positive.
    """

    max_patches: int
    square: bool = False
    enlarge: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.max_patches < 1 or self.multiple < 1:
            raise ValueError(f"max_patches={self.max_patches} and multiple={self.multiple} must be at least 1")

    def grid(self, size_hw_px: tuple[int, int], cfg: CogViTConfig) -> Grid:
        """Return the rows and columns of patches that an image of a size gets."""
        if self.square:
            return cfg.base_grid
        return naflex_grid(*size_hw_px, cfg.patch_size, self.max_patches, enlarge=self.enlarge, multiple=self.multiple)

    def to_json(self, cfg: CogViTConfig) -> dict[str, Any]:
        """Return it as preprocessor_config.json, in transformers' words where it has some."""
        return {
            "sizing": "square" if self.square else "naflex",
            "patch_size": cfg.patch_size,
            "max_num_patches": self.max_patches,
            "enlarge": self.enlarge,
            "grid_multiple": self.multiple,
            "image_size": cfg.image_size,
            "do_resize": True,
            "resample": _BILINEAR,
            "antialias": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": _HALF,
            "image_std": _HALF,
        }


def default_preprocessing(cfg: CogViTConfig) -> Preprocessing:
    """Return what is done where nothing is said: images at their own size, up to the encoder's largest."""
    return Preprocessing(cfg.naflex_max_tokens)


def read_preprocessing(values: Mapping[str, Any], cfg: CogViTConfig) -> Preprocessing:
    """Return what a preprocessor_config.json of ours says.

    Errors: CheckpointError for another filter, normalization or patch, or a number that cannot be.
    """
    expected = {"resample": _BILINEAR, "image_mean": _HALF, "image_std": _HALF, "patch_size": cfg.patch_size}
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise CheckpointError(f"preprocessor_config.json has {name}={values[name]!r}; this encoder has {value!r}")
    try:
        return Preprocessing(
            max_patches=int(values.get("max_num_patches", cfg.naflex_max_tokens)),
            square=values.get("sizing", "naflex") == "square",
            enlarge=bool(values.get("enlarge", False)),
            multiple=int(values.get("grid_multiple", 1)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"preprocessor_config.json: {error}") from None


@dataclass(frozen=True)
class EncodedImages:
    """What an encoder gives for a list of images.

    Attributes:
        patches: of each image, [rows, columns, D].
        pooled: [N, D] fp32, the mean over each image's patches.
    """

    patches: list[Tensor]
    pooled: Tensor


def image_packs(
    images: Sequence[ImageLike] | Tensor, preprocessing: Preprocessing, cfg: CogViTConfig, tokens_per_pack: int
) -> Iterator[PackedImages]:
    """Yield a user's images in order, packed to at most tokens_per_pack patches, or one image where it has more.

    uint8 stays uint8 where all images of a pack are, and the model normalizes it.
    Errors: DataError when an image cannot be taken.
    """
    waiting: list[Tensor] = []
    grids: list[Grid] = []
    for source in sources_of(images):
        patches, grid = _patches_of(source, preprocessing, cfg)
        if waiting and sum(map(len, waiting)) + len(patches) > tokens_per_pack:
            yield pack_images(_of_one_kind(waiting), grids)
            waiting, grids = [], []
        waiting.append(patches)
        grids.append(grid)
    yield pack_images(_of_one_kind(waiting), grids)


def _patches_of(source: Source, preprocessing: Preprocessing, cfg: CogViTConfig) -> tuple[Tensor, Grid]:
    if cfg.in_chans != 3:
        raise DataError(f"images have three channels and this encoder in_chans={cfg.in_chans}; pack them yourself")
    grid = preprocessing.grid(source.size_hw_px, cfg)
    pixels = source.pixels(decode_size(grid[0] * cfg.patch_size, grid[1] * cfg.patch_size))
    return patchify(resize_to_grid(pixels, grid, cfg.patch_size), cfg.patch_size), grid


def _of_one_kind(patches: list[Tensor]) -> list[Tensor]:
    if len({image.dtype for image in patches}) == 1:
        return patches
    return [image.float() / 127.5 - 1.0 if image.dtype == torch.uint8 else image for image in patches]
