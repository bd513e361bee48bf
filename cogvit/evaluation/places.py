"""What the place of a patch alone says of a teacher's features: the baseline of a student that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cogvit.batch import PackedImages

_SIDE = 8  # places in a row and in a column of an image, of whatever shape
_HALVES = 2  # of the images: one is guessed from the other, so that no image is guessed from itself


@dataclass(frozen=True)
class PlaceSums:
    """Sums over the patches of each half and place, from which the explained share follows; made by `place_sums`."""

    count: Tensor  # [2, places]
    total: Tensor  # [2, places, C] float64
    squares: Tensor  # [2, places] float64, summed over the channels

    def __add__(self, other: PlaceSums) -> PlaceSums:
        return PlaceSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def share(self) -> float:
        """Return the share of the variance around each channel's mean that the other half's mean at the place explains.

        A place that the other half lacks is guessed by its mean over all places.
        """
        whole = self.total.sum(dim=1) / self.count.sum(dim=1).clamp(min=1)[:, None]
        mean = torch.where(
            self.count[..., None] > 0, self.total / self.count.clamp(min=1)[..., None], whole[:, None, :]
        ).flip(0)
        errors = self.squares - 2 * (mean * self.total).sum(-1) + self.count * mean.square().sum(-1)
        deviation = self.squares.sum() - (self.total.sum(dim=(0, 1)).square() / self.count.sum()).sum()
        return float(1 - errors.sum() / deviation)


def place_sums(target_TC: Tensor, images: PackedImages, chosen_T: Tensor) -> PlaceSums:
    """Return the sums of the chosen tokens of a pack; an image's half follows from its key."""
    slot_T = images.segment()[chosen_T]
    grid_T2, row_col_T2 = images.grid_hw[slot_T], images.row_col[chosen_T]
    row_T, column_T = ((row_col_T2 * _SIDE) // grid_T2).unbind(dim=1)
    half_T = images.key[slot_T] % _HALVES
    place_T = half_T * _SIDE**2 + row_T * _SIDE + column_T
    x_TC, num_places = target_TC[chosen_T].double(), _HALVES * _SIDE**2
    count = place_T.bincount(minlength=num_places).double()
    total = torch.zeros(num_places, x_TC.shape[1], dtype=torch.float64).index_add_(0, place_T, x_TC)
    squares = torch.zeros(num_places, dtype=torch.float64).index_add_(0, place_T, x_TC.square().sum(dim=1))
    shape = (_HALVES, _SIDE**2)
    return PlaceSums(count.view(shape), total.unflatten(0, shape), squares.view(shape))
