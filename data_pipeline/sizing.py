"""Sizing: from an image's size to its grid of patches, for whole columns of an index at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.config import RunConfig
from cogvit.draws import mix

Ints = NDArray[np.int64]
Sides = NDArray[np.float64]

_BUDGET_SALT = 0x62756467  # "budg"


@dataclass(frozen=True, slots=True)
class Sizing:
    """How an image's size becomes a grid of patches."""

    kind: Literal["square", "naflex", "glm"]
    patch_size_px: int
    square_hw: tuple[int, int]  # grid of every image where kind is square
    max_patches: int
    enlarge: bool
    multiple: int = 1  # both sides of a grid are multiples of it unless kind is square
    budgets: tuple[int, ...] = ()  # patches; one is drawn for an image with a key, max_patches where there are none
    min_patches: int = 0  # glm: smaller images are enlarged to so many

    def grids(self, height_px: Ints, width_px: Ints, key: Ints | None = None, most: Ints | None = None) -> Ints:
        """Return the grid of each image: [B, 2] rows and columns of patches.

        naflex: as `cogvit.model.naflex.naflex_grid`, many at a time; glm: as `cogvit.ImageLimits.size_px`. key: [B]
        seeds of the images' budgets; without, every image has max_patches. most: [B] patches that an image may have
        whatever its budget.
        """
        if self.kind == "square":
            return np.tile(np.array(self.square_hw, np.int64), (len(height_px), 1))
        height, width = height_px.astype(np.int64), width_px.astype(np.int64)
        patches = self._budget(len(height), key, most)
        if self.kind == "glm":
            most_px = np.maximum(patches, self.multiple**2) * float(self.patch_size_px**2)
            return self._near(height.astype(np.float64), width.astype(np.float64), most_px) * self.multiple
        budget = patches // self.multiple**2
        rows, columns = _largest_side(height, width, budget), _largest_side(width, height, budget)
        tall = rows * width >= columns * height
        fitted = np.stack(
            [np.where(tall, rows, -(-height * columns // width)), np.where(tall, -(-width * rows // height), columns)],
            axis=1,
        )
        if not self.enlarge:
            native = self._native(height, width)
            fitted = np.where((native.prod(axis=1) <= budget)[:, None], native, fitted)
        return fitted * self.multiple

    def exceeds(
        self, height_px: Ints, width_px: Ints, key: Ints | None = None, most: Ints | None = None
    ) -> NDArray[np.bool_]:
        """Return which images have more patches than their budget, and so are downsized; none where kind is square."""
        if self.kind == "square":
            return np.zeros(len(height_px), np.bool_)
        budget = self._budget(len(height_px), key, most) // self.multiple**2
        return self._native(height_px.astype(np.int64), width_px.astype(np.int64)).prod(axis=1) > budget

    def _near(self, height: Sides, width: Sides, most_px: Sides) -> Ints:
        """Return the groups of whole images near their own size; most_px: [B] pixels that an image may have.

        Source: as `cogvit.ImageLimits.size_px`, whose order of operations decides where rounding does.
        """
        unit_px, least_px = float(self.patch_size_px * self.multiple), float(self.min_patches * self.patch_size_px**2)
        scale = np.where((height < unit_px) | (width < unit_px), np.maximum(unit_px / height, unit_px / width), 1.0)
        height, width = np.trunc(height * scale), np.trunc(width * scale)
        sides, area = np.stack([height, width], axis=1), height * width
        groups = np.rint(sides / unit_px)
        shrunk = np.maximum(np.floor(sides / np.sqrt(area / most_px)[:, None] / unit_px), 1.0)
        # A thin image's longer side would not fit beside one group.
        budget = most_px / unit_px**2
        shrunk = np.minimum(shrunk, np.maximum(np.floor(budget[:, None] / shrunk[:, ::-1]), 1.0))
        stretched = np.ceil(sides * np.sqrt(least_px / area)[:, None] / unit_px)
        fits = stretched.prod(axis=1) * unit_px**2 <= most_px
        enlarged = np.where(fits[:, None], stretched, shrunk)
        pixels = groups.prod(axis=1) * unit_px**2
        over, under = pixels > most_px, pixels < least_px
        return np.where(over[:, None], shrunk, np.where(under[:, None], enlarged, groups)).astype(np.int64)

    def _budget(self, count: int, key: Ints | None, most: Ints | None) -> Ints:
        """Return the most patches that each image may have: at least one group of multiple x multiple."""
        budget = np.full(count, self.max_patches)
        if key is not None and self.budgets:
            budget = np.array(self.budgets)[mix(torch.from_numpy(key), _BUDGET_SALT).numpy() % len(self.budgets)]
        return budget if most is None else np.minimum(budget, np.maximum(most, self.multiple**2))

    def _native(self, height_px: Ints, width_px: Ints) -> Ints:
        """Return the grids of groups of patches that hold the images as they are."""
        unit_px = self.patch_size_px * self.multiple
        return np.stack([-(-height_px // unit_px), -(-width_px // unit_px)], axis=1)


def sizing_of(config: RunConfig) -> Sizing:
    """Return how a configuration sizes images."""
    vision, data = config.vision, config.data
    return Sizing(
        kind=data.sizing,
        patch_size_px=vision.patch_size,
        square_hw=vision.base_grid,
        max_patches=data.max_patches,
        enlarge=data.enlarge,
        multiple=data.grid_multiple,
        budgets=data.budgets_patches,
        min_patches=data.min_patches,
    )


def _largest_side(side_px: Ints, other_px: Ints, budget: Ints) -> Ints:
    """Return the most patches n of a side, whose grid n x ceil(n * other / side) fits."""
    low, high = np.zeros_like(side_px), budget.copy()
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        fits = middle * -(-other_px * middle // side_px) <= budget
        low, high = np.where(open_ & fits, middle, low), np.where(open_ & ~fits, middle - 1, high)
    return low
