"""Augmentation, drawn from an image's key: student and teachers see the same picture, and a replay sees it again.

The teachers of a feature store saw the plain pictures, so nothing here may be on with one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import uniform

_FLIP_SALT = 0x666C6970  # "flip"


def mirrored(key: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which images are seen mirrored where data.flip is on: half of them."""
    return uniform(torch.from_numpy(key), _FLIP_SALT).numpy() < 0.5
