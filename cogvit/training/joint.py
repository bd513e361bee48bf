"""Encoder, adapter and language model together: what a run of stage 3 begins with, and what it has become."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cogvit.config import RunConfig, load_config
from cogvit.config.recipe import PARTS
from cogvit.errors import CheckpointError
from cogvit.model.adapter import fitted_adapter
from cogvit.model.chat import image_token_id
from cogvit.model.hub import dtype_of
from cogvit.model.image_input import ImageLimits
from cogvit.model.interop import load_checked
from cogvit.model.language import CausalLM
from cogvit.model.language_config import LanguageConfig
from cogvit.model.layouts.causal_lm import read_shape
from cogvit.model.layouts.causal_lm_file import CausalLMFile
from cogvit.model.layouts.files import CONFIG, read_json
from cogvit.model.layouts.vision_language import MODEL_TYPE
from cogvit.model.pretrained import load_tokenizer
from cogvit.model.vit import CogViT
from cogvit.model.vlm import VisionLanguageModel
from cogvit.training.checkpoint import weights
from cogvit.training.folder import Folder
from cogvit.training.restore import (
    check_source,
    drawn,
    initial_towers,
    is_run,
    latest_of_run,
    preprocessing_of,
    vision_weights,
)


def given_weights(config: RunConfig) -> Mapping[str, Tensor]:
    """Return what a run does not draw: those of --init, and the language model's where that has none, read when asked.

    Errors: CheckpointError when the vision tower of --init is not this run's, or weights are missing or damaged.
    """
    found: dict[str, Tensor] = {}
    if config.init:
        started = initial_towers(config)
        found = {name: tensor for name, tensor in started.items() if name.split(".")[0] in PARTS}
    if any(name.startswith("language.") for name in found):
        return found
    return ChainMap(found, cast(Any, CausalLMFile(Path(config.language.path), "language.")))  # both are only read


def is_joint(path: Path) -> bool:
    """Whether a path is a run of stage 3, or a directory of a whole vision-language model."""
    if is_run(path):
        return bool(load_config(path / "config.json").language.path)
    try:
        values = read_json(path / CONFIG)
    except CheckpointError:
        return False
    return values.get("model_type") == MODEL_TYPE or "text_config" in values


def load_joint(path: Path, dtype: str = "fp32") -> VisionLanguageModel:
    """Load the newest good checkpoint of a run of stage 3, or a directory that VisionLanguageModel reads; in eval mode.

    dtype: of the weights, as `VisionLanguageModel.from_pretrained` takes it. Frozen parts come from where the run had
    them. Errors: CheckpointError when there is neither, they changed, or the
    weights do not fit.
    """
    if not is_run(path):
        return VisionLanguageModel.from_pretrained(path, dtype=dtype)
    config, checkpoint = load_config(path / "config.json"), latest_of_run(path)
    if not config.language.path:
        raise CheckpointError(f"{path} has no language model; pass a run of stage 3, or an export of one")
    shape = replace(read_shape(Path(config.language.path)), mmtp=config.mmtp)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, shape)
    given = {
        "vision": vision_weights(config, checkpoint),
        "adapter": _weights(config, checkpoint, "adapter", drawn("adapter", adapter, config)),
        "language": _weights(config, checkpoint, "language", {}),
    }
    return _joined(config, shape, given).to(dtype_of(dtype)).eval()


def initial_joint(config: RunConfig) -> VisionLanguageModel:
    """Return the model that a run begins with, whatever it has become; in eval mode. Errors: as `load_joint`."""
    shape = replace(read_shape(Path(config.language.path)), mmtp=config.mmtp)
    adapter, began = fitted_adapter(config.adapter, config.vision.embed_dim, shape), given_weights(config)
    fresh = drawn("vision", CogViT(config.vision), config) | drawn("adapter", adapter, config)
    return _joined(config, shape, {part: _part_of(began, part, fresh) for part in PARTS}).eval()


def _joined(config: RunConfig, shape: LanguageConfig, given: Mapping[str, dict[str, Tensor]]) -> VisionLanguageModel:
    """Put a run's parts together with these weights."""
    directory = Path(config.language.path)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(f"--language.path {directory} of {config.out} has no tokenizer any more; put it back")
    vision = CogViT(config.vision)
    load_checked(vision, given["vision"])
    vision.preprocessing = preprocessing_of(config)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, shape)
    load_checked(adapter, given["adapter"])
    with torch.device("meta"):
        names = CausalLM(shape).state_dict().keys()  # without heads for more tokens that the run did not have
    language = CausalLM.from_weights(shape, {name: given["language"][name] for name in names})
    return VisionLanguageModel(vision, adapter, language, image_token_id(tokenizer), limits_of(config), tokenizer)


def limits_of(config: RunConfig) -> ImageLimits:
    """Return how large a run of stage 3 shows images, which its export repeats; of several budgets the largest."""
    patch_px, data = config.vision.patch_size, config.data
    least = max(data.min_patches, 1) * patch_px**2
    return ImageLimits(patch_px * config.adapter.spatial_pool, least, data.max_patches * patch_px**2)


def _weights(config: RunConfig, checkpoint: Folder, part: str, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights as the run stored them, or where it was frozen, as it began; fresh: where nothing gave them."""
    stored = weights(checkpoint, f"{part}.")
    if stored:
        return stored
    check_source(config, "language.path" if part == "language" else "init")
    return _part_of(given_weights(config), part, fresh)


def _part_of(began: Mapping[str, Tensor], part: str, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights under its own names: what a run began with, or was drawn where nothing gave it."""
    given = {**fresh, **{name: began[name] for name in began if name.startswith(f"{part}.")}}
    return {name.removeprefix(f"{part}."): x for name, x in given.items() if name.startswith(f"{part}.")}
