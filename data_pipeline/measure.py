"""What samples weigh: the grids of their images, their tokens and what they cost, known from the index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogvit.draws import mix
from data_pipeline.balance import attention_cost
from data_pipeline.caption import CaptionChoice, choose_captions
from data_pipeline.clips import Shown, shown_of
from data_pipeline.index import Index
from data_pipeline.sizing import Sizing
from data_pipeline.spec import LanguageSpec, PlanSpec
from data_pipeline.token_counts import TokenCounts

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pictures:
    """All images and frames of B samples, sample after sample."""

    shown: Shown
    key: Ints  # [E], seed of every draw for the image; the sample's own for the first, and one for all of a video
    grid_hw: Ints  # [E, 2]
    downsized: NDArray[np.bool_]  # [E]


@dataclass(frozen=True, slots=True)
class Measured:
    """What B samples weigh."""

    grid_hw: Ints  # [B, 2], of the first image; (0, 0) where there is none
    patches: Ints  # [B], of all images
    images: Ints  # [B]
    tokens: Ints  # [B], of the language model at most; 0 where there is none
    phases: Ints  # [B, 2], what the vision tower and the language model cost
    downsized: Ints  # [B], images that have more patches than their budget


@dataclass(frozen=True)
class Measure:
    """Measures samples of an index for a plan. counts: of their texts, where a language model reads them."""

    index: Index
    spec: PlanSpec
    counts: TokenCounts | None = None

    def of(self, rows: Ints, key: Ints, sizing: Sizing) -> Measured:
        """Return what some rows weigh; key [B] seeds their draws."""
        entries, language = self.index.take(rows), self.spec.language
        if language is None:
            height_px, width_px = entries["height_px"], entries["width_px"]
            grid_hw = sizing.grids(height_px, width_px, key)
            patches, none = grid_hw.prod(axis=1), np.zeros(len(rows), np.int64)
            cost = attention_cost(patches, self.spec.attention_tokens)
            phases = np.stack([cost, none], axis=1)
            downsized = sizing.exceeds(height_px, width_px, key).astype(np.int64)
            return Measured(grid_hw, patches, none + 1, none, phases, downsized)
        assert self.counts is not None, "a language model's plan counts tokens"
        found = pictures(self.index, rows, key, sizing, language)
        each, owner = found.grid_hw.prod(axis=1), found.shown.owner
        patches, images, downsized, vision = (
            _summed(owner, values, len(rows))
            for values in (each, np.ones_like(each), found.downsized, attention_cost(each, self.spec.attention_tokens))
        )
        # A text counts one token an image, of which two around it are left over where there are such.
        around = images if language.framed else -images
        tokens = self.counts.of(rows, choice_of(entries, key, language)) + around + patches // language.spatial_pool**2
        tokens = np.minimum(tokens, language.max_tokens)
        grid_hw = np.zeros((len(rows), 2), np.int64)
        first = found.shown.place == 0
        grid_hw[owner[first]] = found.grid_hw[first]
        numerator, denominator = language.token_cost
        spoken = attention_cost(tokens, language.attention_tokens) * numerator // denominator
        seen = vision * language.vision_passes + images * language.sharp_cost
        phases = np.stack([seen, spoken], axis=1)
        return Measured(grid_hw, patches, images, tokens, phases, downsized)


def choice_of(entries: NDArray[Any], key: Ints, language: LanguageSpec) -> CaptionChoice:
    """Return which caption each sample uses; a conversation counts as the only one."""
    return choose_captions(entries["num_captions"].astype(np.int64), key, language.zh_fraction)


def pictures(index: Index, rows: Ints, key: Ints, sizing: Sizing, language: LanguageSpec) -> Pictures:
    """Return what is shown of some rows; what is shown of one sample shares its patches evenly where it is too much."""
    shown = shown_of(index, rows, language.video)
    own_key = key[shown.owner]
    later = shown.number > 0
    own_key[later] = mix(torch.from_numpy(own_key[later]), torch.from_numpy(shown.number[later])).numpy()
    most = language.max_patches // np.bincount(shown.owner, minlength=len(rows))[shown.owner]
    grid_hw = sizing.grids(shown.height_px, shown.width_px, own_key, most)
    downsized = sizing.exceeds(shown.height_px, shown.width_px, own_key, most)
    return Pictures(shown, own_key, grid_hw, downsized)


def _summed(owner: Ints, values: NDArray[Any], count: int) -> Ints:
    total = np.zeros(count, np.int64)
    np.add.at(total, owner, values.astype(np.int64))
    return total
