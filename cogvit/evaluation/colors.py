"""What the colors of an image alone say of its caption: the baseline of a retrieval that looks at no shape.

A caption stands for the colors of the training images that have it. Where held-out images bear captions of training
images, this is also what says so: the retrieval is of new images of what was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.evaluation.ranks import ALONE, Ranks
from cogvit.evaluation.samples import Samples, read_captions, read_images, rows_of, spread
from data_pipeline.decode import Pixels
from data_pipeline.index import Index

MAX_IMAGES = 20_000  # of a source of the training images, evenly spread: colors need no more
_SIDE_PX = 32
_LEVELS = 4  # of each channel
_BINS = _LEVELS**3


@dataclass(frozen=True, eq=False)
class KnownCaptions:
    """The captions of training images, each with the colors of these images; made by `known_captions`."""

    colors: dict[str, dict[str, Tensor]]  # by language and caption, [BINS] sums
    everything: Tensor  # [BINS], of all training images: for a caption that none has

    def share(self, language: str, captions: Sequence[str]) -> float:
        """Return the share of some captions that training images have."""
        known = self.colors.get(language, {})
        return sum(caption in known for caption in captions) / len(captions)

    def features(self, language: str, captions: Sequence[str]) -> Tensor:
        """Return unit vectors for some captions, as `color_features` of images."""
        known = self.colors.get(language, {})
        return F.normalize(torch.stack([known.get(caption, self.everything) for caption in captions]), dim=1)


def color_features(samples: Samples, ranks: Ranks = ALONE) -> Tensor:
    """Return how often each of 64 colors occurs in an image, as unit vectors [n, 64]; collective over the ranks.

    The roots of the shares: their inner product is high where two images have the same colors (Bhattacharyya).
    The features of an image that does not decode are NaN.
    """

    def part() -> Tensor:
        features = torch.zeros(len(samples), _BINS)
        places = list(ranks.mine(range(len(samples))))
        size_hw_px = np.full((len(places), 2), _SIDE_PX)
        for place, image in zip(places, read_images(samples.index, samples.rows[places], size_hw_px), strict=True):
            features[place] = torch.nan if image is None else _histogram(image)
        return features

    return ranks.whole(part)


def _histogram(image: Pixels) -> Tensor:
    level = image.astype(np.int64) * _LEVELS // 256
    color = level @ np.array([_LEVELS**2, _LEVELS, 1])
    counts = np.bincount(color.ravel(), minlength=_BINS)
    return torch.from_numpy(np.sqrt(counts / counts.sum()))


def known_captions(
    train: Index, sources: Sequence[str], caption_field: str = "", ranks: Ranks = ALONE
) -> KnownCaptions:
    """Look at the captions and colors of training images of some sources, MAX_IMAGES of each; collective.

    caption_field is data.caption_field. Errors: DataError when a shard cannot be read.
    """
    known = KnownCaptions({}, torch.zeros(_BINS))
    for source in sources:
        rows = spread(rows_of(train, source), MAX_IMAGES)
        samples = Samples(source, train, rows, None, {})
        features = color_features(samples, ranks).nan_to_num()
        known.everything.add_(features.sum(dim=0))
        for feature, captions in zip(features, read_captions(train, rows, caption_field), strict=True):
            for language, texts in captions.items():
                of_language = known.colors.setdefault(language, {})
                for text in dict.fromkeys(texts):
                    of_language[text] = of_language.get(text, torch.zeros(_BINS)) + feature
    return known
