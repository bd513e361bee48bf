"""Features of samples: one vector for each image or caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvit.batch import to_device
from cogvit.evaluation.samples import Samples, pack_rows, read_images
from cogvit.evaluation.subject import Subject
from cogvit.model.tokens import pool_mean
from cogvit.model.vit import CogViT
from data_pipeline.caption import load_tokenizer
from data_pipeline.sizing import Sizing

_PIXELS_SIDE_PX = 32
_CAPTIONS_PER_BATCH = 256


@torch.inference_mode()
def image_features(vision: CogViT, samples: Samples, sizing: Sizing) -> Tensor:
    """Return the mean over each image's patch features, [n, D] fp32 on the CPU."""
    features = torch.empty(len(samples), vision.cfg.embed_dim)
    device = vision.mask_token.device
    for pack in pack_rows(samples.index, samples.rows, sizing):
        images = to_device(pack.images, device)
        patch_TD = vision.forward_packed(images).patch_TD
        features[pack.places] = pool_mean(patch_TD, images.segment(), images.num_slots).cpu()
    return features


def pixel_features(samples: Samples) -> Tensor:
    """Return the images' pixels on a common small square, [n, side * side * 3]: what no encoder was needed for."""
    size_hw_px = np.full((len(samples), 2), _PIXELS_SIDE_PX)
    images = read_images(samples.index, samples.rows, size_hw_px)
    return torch.stack([torch.from_numpy(image).flatten() / 255 for image in images])


@torch.inference_mode()
def embed_images(subject: Subject, features: Tensor) -> Tensor:
    """Return `image_features` in the shared space: [n, E] unit vectors; for stage 2."""
    projection = subject.towers.vision_proj
    assert projection is not None, "stage 2 has a text side"
    return F.normalize(projection(features.to(projection.weight.device)), dim=1).cpu()


@torch.inference_mode()
def embed_texts(subject: Subject, captions: Sequence[str]) -> Tensor:
    """Return captions in the shared space: [n, E] unit vectors; for stage 2."""
    tower, projection, config = subject.towers.text, subject.towers.text_proj, subject.config
    assert tower is not None and projection is not None and config is not None, "stage 2 has a text side"
    tokenizer = load_tokenizer(config.data.tokenizer, config.text.vocab_size)
    embedded = []
    for start in range(0, len(captions), _CAPTIONS_PER_BATCH):
        texts = captions[start : start + _CAPTIONS_PER_BATCH]
        ids = [torch.from_numpy(tokenizer.encode(text, config.text.max_tokens).ids) for text in texts]
        valid = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        device = projection.weight.device
        pooled = tower(pad_sequence(ids, batch_first=True).to(device), valid.to(device))
        embedded.append(F.normalize(projection(pooled), dim=1).cpu())
    return torch.cat(embedded)
