"""What defines a sequence of global batches, besides the corpus and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from cogvit.config import RunConfig
from cogvit.model.config import CogViTConfig, TextConfig, VideoConfig
from cogvit.model.dialog import tokenizer_fingerprint
from cogvit.model.pretrained_language import language_shape
from data_pipeline.balance import attention_cost
from data_pipeline.sizing import Sizing, sizing_of

Value = TypeVar("Value")

_TRAINED, _FROZEN_VISION, _FROZEN_LANGUAGE = 3, 1, 2  # passes: forward, gradients of inputs, gradients of weights


@dataclass(frozen=True, slots=True)
class LanguageSpec:
    """What a plan depends on where a language model reads the samples."""

    tokenizer: str  # its fingerprint
    prompts: tuple[tuple[str, str], ...]  # what a caption answers, by language
    max_tokens: int  # of a sample
    max_patches: int  # of a sample's images together
    spatial_pool: int  # sides of the groups of patches that are a token
    zh_fraction: float
    attention_tokens: int  # n0 of the language model
    token_cost: tuple[int, int]  # of n0 tokens over that of n0 patches, as a fraction; trained parts cost thrice
    vision_passes: int
    video: VideoConfig
    framed: bool = False  # learned tokens stand around each image
    sharp_cost: int = 0  # of a second encoder for each image, in units of the vision tower's forward and backward


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """Everything besides index and seed that defines the sequence of global batches."""

    mixture: tuple[tuple[str, float], ...]  # source, weight; all samples are one pool where it is empty
    global_batch_images: int
    canonical_shares: int
    lookahead_steps: int
    sizing: Sizing
    attention_tokens: int  # n0: the length at which attention costs as much as everything else
    batch_schedule: tuple[tuple[int, int], ...] = ()  # step, global_batch_images from it on
    budget_schedule: tuple[tuple[int, tuple[int, ...]], ...] = ()  # step, sizing.budgets from it on
    language: LanguageSpec | None = None

    @property
    def smallest_window_images(self) -> int:
        """Images that every look-ahead window has at least."""
        return self.lookahead_steps * min([self.global_batch_images, *(images for _, images in self.batch_schedule)])

    def batch_images(self, step: int) -> int:
        """Return the images of a step's global batch."""
        return _in_force(self.batch_schedule, step, self.global_batch_images)

    def images_before(self, window: int) -> int:
        """Return the images of all look-ahead windows before one."""
        end, total, images, since = window * self.lookahead_steps, 0, self.global_batch_images, 0
        for start, later in self.batch_schedule:
            if start >= end:
                break
            total, images, since = total + images * (start - since), later, start
        return total + images * (end - since)

    def sizing_at(self, step: int) -> Sizing:
        """Return how the images of a step are sized."""
        return replace(self.sizing, budgets=_in_force(self.budget_schedule, step, self.sizing.budgets))


def _in_force(schedule: Sequence[tuple[int, Value]], step: int, before: Value) -> Value:
    """Return the value of the last entry that has begun, or what holds before the first."""
    return next((value for start, value in reversed(schedule) if start <= step), before)


def attention_tokens(tower: CogViTConfig | TextConfig) -> int:
    """Return n0 of a tower: the length at which attention costs as much as everything else."""
    branches = 3 if tower.mlp == "swiglu" else 2
    # Per token and layer: 8 D^2 + 2 * branches * D * F of matrix products, 4 n D of attention.
    return 2 * tower.embed_dim + branches * tower.mlp_dim // 2


def plan_spec(config: RunConfig) -> PlanSpec:
    """Return the part of a configuration that the plan depends on."""
    data = config.data
    return PlanSpec(
        mixture=data.mixture,
        global_batch_images=data.global_batch_images,
        canonical_shares=data.canonical_shares,
        lookahead_steps=data.lookahead_steps,
        sizing=sizing_of(config),
        attention_tokens=attention_tokens(config.vision),
        batch_schedule=data.batch_schedule,
        budget_schedule=data.budget_schedule,
        language=_language_spec(config) if config.language.path else None,
    )


def _language_spec(config: RunConfig) -> LanguageSpec:
    """Errors: CheckpointError when the language model's config.json is not there or not ours."""
    own, path = config.language, Path(config.language.path)
    shape, vision = language_shape(path), config.vision
    # Per token and layer: 2 a multiply-add of each matrix, and 2 n a channel of causal attention.
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    channels = shape.num_heads * shape.head_dim
    matrices = (
        shape.embed_dim * (qkv + channels + 3 * shape.mlp_dim) + shape.embed_dim * shape.vocab_size // shape.depth
    )
    learns = config.optim.language.lr_mult > 0.0 or config.expert.every > 0
    language_passes = _TRAINED if learns else _FROZEN_LANGUAGE
    return LanguageSpec(
        tokenizer=tokenizer_fingerprint(path),
        prompts=own.prompts,
        max_tokens=own.max_tokens,
        max_patches=own.max_patches,
        spatial_pool=config.adapter.spatial_pool,
        zh_fraction=config.data.zh_fraction,
        attention_tokens=max(1, matrices // channels),
        token_cost=(language_passes * channels * shape.depth, 2 * vision.embed_dim * vision.depth),
        vision_passes=_TRAINED if config.optim.vision.lr_mult else _FROZEN_VISION,
        video=config.video,
        framed=config.expert.every > 0,
        sharp_cost=_sharp_cost(config) if config.cross.image_size else 0,
    )


def _sharp_cost(config: RunConfig) -> int:
    module, vision = config.cross, config.vision
    units = attention_cost(np.array([module.rows_per_image]), 2 * module.embed_dim + 3 * module.mlp_dim // 2)
    return _TRAINED * int(units[0]) * module.embed_dim * module.depth // (vision.embed_dim * vision.depth)
