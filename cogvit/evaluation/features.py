"""Features of samples: one vector for each image or caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvit.batch import to_device
from cogvit.errors import DataError
from cogvit.evaluation.ranks import ALONE, Ranks
from cogvit.evaluation.samples import Ints, Samples, pack_rows, read_images
from cogvit.evaluation.subject import Subject
from cogvit.model.tokenizer import load_tokenizer
from cogvit.model.tokens import pool_mean
from cogvit.model.vit import CogViT
from data_pipeline.sizing import Sizing

_PIXELS_SIDE_PX = 32
_CAPTIONS_PER_BATCH = 256
_MAX_DAMAGED = 0.01  # of a set of images, beyond one


@torch.inference_mode()
def image_features(vision: CogViT, samples: Samples, sizing: Sizing, ranks: Ranks = ALONE) -> Tensor:
    """Return the mean over each image's patch features, [n, D] fp32 on the CPU; collective over the ranks.

    The features of an image that does not decode are NaN: see `decoded`.
    """
    device = vision.mask_token.device

    def part() -> Tensor:
        features = torch.zeros(len(samples), vision.cfg.embed_dim)
        for pack in pack_rows(samples.index, samples.rows, sizing, ranks):
            images = to_device(pack.images, device)
            patch_TD = vision.forward_packed(images).patch_TD
            pooled_ND = pool_mean(patch_TD, images.segment(), images.num_slots).cpu()
            features[pack.places] = torch.where(pack.decoded[:, None], pooled_ND, torch.nan)
        return features

    return ranks.whole(part)


def pixel_features(samples: Samples, ranks: Ranks = ALONE) -> Tensor:
    """Return the images' pixels on a common small square, [n, side * side * 3]: what no encoder was needed for."""

    def part() -> Tensor:
        features = torch.zeros(len(samples), _PIXELS_SIDE_PX**2 * 3)
        places = list(ranks.mine(range(len(samples))))
        size_hw_px = np.full((len(places), 2), _PIXELS_SIDE_PX)
        for place, image in zip(places, read_images(samples.index, samples.rows[places], size_hw_px), strict=True):
            features[place] = torch.nan if image is None else torch.from_numpy(image).flatten() / 255
        return features

    return ranks.whole(part)


def decoded(features: Tensor, samples: Samples) -> Ints:
    """Return the places of the samples whose images decode.

    Errors: DataError, which names the first that does not, when they are more than one and one in a hundred, or all.
    """
    good = torch.isfinite(features[:, 0])
    damaged = np.flatnonzero(~good.numpy())
    if len(damaged) > max(1, _MAX_DAMAGED * len(samples)) or len(damaged) == len(samples):
        first = samples.index.name(int(samples.rows[damaged[0]]))
        share = f"more than {_MAX_DAMAGED:.0%}" if len(damaged) < len(samples) else "all of them"
        raise DataError(
            f"{len(damaged)} of {len(samples)} images of {samples.source} do not decode ({first} first), which is"
            f" {share}; repair or remove them"
        )
    return np.flatnonzero(good.numpy())


@torch.inference_mode()
def embed_images(subject: Subject, features: Tensor) -> Tensor:
    """Return `image_features` in the shared space: [n, E] unit vectors; for stage 2."""
    projection = subject.towers.vision_proj
    assert projection is not None, "stage 2 has a text side"
    return F.normalize(projection(features.to(projection.weight.device)), dim=1).cpu()


@torch.inference_mode()
def embed_texts(subject: Subject, captions: Sequence[str]) -> Tensor:
    """Return captions in the shared space: [n, E] unit vectors; for stage 2; collective over the ranks."""
    tower, projection, side = subject.towers.text, subject.towers.text_proj, subject.towers.text_side
    assert tower is not None and projection is not None and side is not None, "stage 2 has a text side"
    device = projection.weight.device

    def part() -> Tensor:
        tokenizer = load_tokenizer(side.tokenizer, side.text.vocab_size)
        embedded = torch.zeros(len(captions), projection.out_features)
        for start in subject.ranks.mine(range(0, len(captions), _CAPTIONS_PER_BATCH)):
            texts = captions[start : start + _CAPTIONS_PER_BATCH]
            ids = [torch.from_numpy(tokenizer.encode(text, side.text.max_tokens).ids) for text in texts]
            valid = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
            pooled = tower(pad_sequence(ids, batch_first=True).to(device), valid.to(device))
            embedded[start : start + len(texts)] = F.normalize(projection(pooled), dim=1).cpu()
        return embedded

    return subject.ranks.whole(part)
