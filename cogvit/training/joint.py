"""Encoder, adapter and language model together: what a run of stage 3 begins with, and what it has become."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cogvit.config import RunConfig, load_config
from cogvit.config.recipe import PARTS, frozen_parts
from cogvit.errors import CheckpointError
from cogvit.model.adapter import fitted_adapter
from cogvit.model.chat import image_token_id
from cogvit.model.eva import EvaEncoder, second_encoder
from cogvit.model.expert import beginning_of, is_grown
from cogvit.model.frame import ImageFrame
from cogvit.model.hub import dtype_of
from cogvit.model.image_input import ImageLimits, ImageSize, SquareImages
from cogvit.model.interop import load_checked
from cogvit.model.language import CausalLM
from cogvit.model.language_config import FAMILIES, LanguageConfig, cross_of
from cogvit.model.layouts.causal_lm_file import CausalLMFile
from cogvit.model.layouts.files import CONFIG, read_json
from cogvit.model.layouts.vision_language import MODEL_TYPE
from cogvit.model.pretrained import load_tokenizer
from cogvit.model.pretrained_language import PretrainedLanguage, WholeLanguage, language_shape
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


def given_weights(config: RunConfig, whole: WholeLanguage | None = None) -> Mapping[str, Tensor]:
    """Return what a run does not draw: those of --init, and the language model's where that has none, read when asked.

    whole: the language model, copied from here, where it is one of transformers.
    Errors: CheckpointError when the vision tower or the language model of --init is not this run's, or weights are
    missing or damaged.
    """
    found: dict[str, Tensor] = {}
    if config.init:
        started = initial_towers(config)
        found = {name: tensor for name, tensor in started.items() if name.split(".")[0] in (*PARTS, "frame", "cross")}
    own: Mapping[str, Tensor]
    if whole is None:
        own = CausalLMFile(Path(config.language.path), "language.")
    else:
        own = {f"language.{name}": parameter.detach().cpu().clone() for name, parameter in whole.named_parameters()}
    if not any(name.startswith("language.") and not is_grown(name) for name in found):
        return _Grown(ChainMap(found, cast(Any, own)))  # both are only read
    missing = [name for name in own if name not in found]
    if missing:
        raise CheckpointError(
            f"--init {config.init} has another language model than --language.path {config.language.path}: it lacks"
            f" {len(missing)} weights, {missing[0]} first; its export (tools.export) holds the vision tower alone"
        )
    return _Grown(found)


class _Grown(Mapping[str, Tensor]):
    """Weights with those of visual experts, which begin as the language model's where nobody gives them."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Tensor:
        return self._given[name if name in self._given else beginning_of(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._given or (isinstance(name, str) and beginning_of(name) in self._given)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


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
    language = _language(config, checkpoint)
    whole = language if isinstance(language, PretrainedLanguage) else None
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, language.cfg)
    given = {
        "vision": vision_weights(config, checkpoint),
        "adapter": _weights(config, checkpoint, "adapter", drawn("adapter", adapter, config), whole),
    }
    if config.expert.every:
        fresh = drawn("frame", ImageFrame(language.cfg.embed_dim), config)
        given["frame"] = _weights(config, checkpoint, "frame", fresh)
    if config.cross.image_size:
        given["cross"] = weights(checkpoint, "cross.")
    return _joined(config, language, given).to(dtype_of(dtype)).eval()


def initial_joint(config: RunConfig) -> VisionLanguageModel:
    """Return the model that a run begins with, whatever it has become, without what grows on it; in eval mode.

    Its prompts and answers are as long as the run's samples may be, language.max_tokens.
    Errors: as `load_joint`, and CheckpointError for a language model of another family than ours.
    """
    shape = language_shape(Path(config.language.path))
    if not isinstance(shape, LanguageConfig):
        raise CheckpointError(f"--language.path {config.language.path} is of no family of ours ({', '.join(FAMILIES)})")
    shape = replace(shape, mmtp=config.mmtp, max_tokens=min(shape.max_tokens, config.language.max_tokens))
    began = given_weights(config)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, shape)
    fresh = drawn("vision", CogViT(config.vision), config) | drawn("adapter", adapter, config)
    given: dict[str, dict[str, Tensor]] = {part: _part_of(began, part, fresh) for part in PARTS}
    return _joined(config, _causal(shape, given["language"]), given).eval()


def _joined(
    config: RunConfig, language: CausalLM | PretrainedLanguage, given: Mapping[str, dict[str, Tensor]]
) -> VisionLanguageModel:
    """Put a run's parts together with these weights."""
    tokenizer = load_tokenizer(Path(config.language.path))
    if tokenizer is None:
        raise CheckpointError(
            f"--language.path {config.language.path} of {config.out} has no tokenizer any more; put it back"
        )
    vision = CogViT(config.vision)
    load_checked(vision, given["vision"])
    vision.preprocessing = preprocessing_of(config)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, language.cfg)
    load_checked(adapter, given["adapter"])
    frame: ImageFrame | None = None
    if "frame" in given:
        frame = ImageFrame(language.cfg.embed_dim)
        load_checked(frame, given["frame"])
    cross: EvaEncoder | None = None
    if "cross" in given:
        cross = EvaEncoder(second_encoder(config.cross))
        load_checked(cross, given["cross"])
    limits, token_id = limits_of(config), image_token_id(tokenizer)
    return VisionLanguageModel(vision, adapter, language, token_id, limits, tokenizer, frame, cross, video=config.video)


def _language(config: RunConfig, checkpoint: Folder) -> CausalLM | PretrainedLanguage:
    """The language model of a run; one of transformers has more than weights, and is read from where it was first."""
    directory = Path(config.language.path)
    shape = language_shape(directory)
    if not isinstance(shape, LanguageConfig):
        whole = PretrainedLanguage.from_pretrained(directory)
        whole.set_weights(_weights(config, checkpoint, "language", {}, whole))
        return whole
    shape = replace(shape, mmtp=config.mmtp, expert=config.expert, cross=cross_of(config.cross))
    return _causal(shape, _weights(config, checkpoint, "language", {}))


def _causal(shape: LanguageConfig, given: Mapping[str, Tensor]) -> CausalLM:
    """A language model of ours with these weights, without those of heads for more tokens that the run did not have."""
    with torch.device("meta"):
        names = CausalLM(shape).state_dict().keys()
    return CausalLM.from_weights(shape, {name: given[name] for name in names})


def limits_of(config: RunConfig) -> ImageSize:
    """Return how large a run of stage 3 shows images, which its export repeats; of several budgets the largest."""
    patch_px, data = config.vision.patch_size, config.data
    if data.sizing == "square":
        return SquareImages(patch_px * config.adapter.spatial_pool, config.vision.image_size)
    least = max(data.min_patches, 1) * patch_px**2
    return ImageLimits(patch_px * config.adapter.spatial_pool, least, data.max_patches * patch_px**2)


def _weights(
    config: RunConfig,
    checkpoint: Folder,
    part: str,
    fresh: dict[str, Tensor],
    whole: PretrainedLanguage | None = None,
) -> dict[str, Tensor]:
    """A part's weights as the run stored them, or where it was frozen, as it began; fresh: where nothing gave them.

    Of a frozen language model what grows on it is stored. whole: as in `given_weights`.
    """
    stored = weights(checkpoint, f"{part}.")
    if stored and not (part == "language" and part in frozen_parts(config)):
        return stored
    check_source(config, "language.path" if part == "language" else "init")
    return _part_of(given_weights(config, whole), part, fresh) | stored


def _part_of(began: Mapping[str, Tensor], part: str, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights under its own names: what a run began with, or was drawn where nothing gave it."""
    given = {**fresh, **{name: began[name] for name in began if name.startswith(f"{part}.")}}
    return {name.removeprefix(f"{part}."): x for name, x in given.items() if name.startswith(f"{part}.")}
