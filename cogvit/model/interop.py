"""Weights on disk as others read them: a directory of config.json and model.safetensors.

Two layouts are read and written: our own, and that of GLM-OCR's vision tower in transformers (`cogvit.model.glm_ocr`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cogvit.config import from_json
from cogvit.errors import CheckpointError, ConfigError
from cogvit.model import glm_ocr
from cogvit.model.config import CogViTConfig
from cogvit.model.glm_ocr import GlmOcrShape
from cogvit.model.layouts.files import CONFIG, WEIGHTS, read_json, read_weights, write_files, write_json
from cogvit.model.layouts.parts import check_shapes
from cogvit.model.preprocess import Preprocessing, default_preprocessing, read_preprocessing

_MODEL_TYPE = "cogvit"
_NOT_OURS = ("model_type", "architectures", "auto_map", "dtype", "transformers_version")  # of a config.json of ours
_TEXT_SIDE = "text_side"  # directory inside an export
_AUTO_FILE = "modeling_cogvit"
_AUTO = {"auto_map": {"AutoConfig": f"{_AUTO_FILE}.CogViTModelConfig", "AutoModel": f"{_AUTO_FILE}.CogViTModel"}}
_AUTO_SOURCE = """# For transformers' AutoModel.from_pretrained(DIR, trust_remote_code=True); the code is the package's.
from cogvit.model.auto import CogViTModel, CogViTModelConfig

__all__ = ["CogViTModel", "CogViTModelConfig"]
"""
PROCESSOR, _NESTED = "preprocessor_config.json", "processor_config.json"  # of transformers; the second holds the first
_OURS = (glm_ocr.IMAGE_MEAN, glm_ocr.IMAGE_STD)
_THEIRS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # transformers' default, CLIP's


def write_model(
    directory: Path, cfg: CogViTConfig, weights: Mapping[str, Tensor], preprocessing: Preprocessing
) -> None:
    """Write a vision encoder's config.json, model.safetensors and preprocessor_config.json; the directory is made.

    Beside them lies what transformers' AutoModel loads with trust_remote_code: a file that imports ours.
    """
    write_files(
        directory, {"model_type": _MODEL_TYPE, "architectures": ["CogViTModel"], **_AUTO, **asdict(cfg)}, weights
    )
    write_json(directory / PROCESSOR, preprocessing.to_json(cfg))
    (directory / f"{_AUTO_FILE}.py").write_text(_AUTO_SOURCE)


def read_processing(directory: Path, cfg: CogViTConfig) -> Preprocessing:
    """Read how an export's images are prepared; the default where it does not say. Errors: CheckpointError."""
    own = _read_config(directory)["model_type"] == _MODEL_TYPE
    if not (directory / PROCESSOR).exists():
        return default_preprocessing(cfg)
    values = read_json(directory / PROCESSOR)
    return read_preprocessing(values, cfg) if own else glm_ocr.preprocessing_of(values, cfg)


def read_model(directory: Path) -> tuple[CogViTConfig, dict[str, Tensor]]:
    """Read what `write_model` or `write_glm_ocr` wrote, or a GLM-OCR checkpoint of transformers.

    Where GLM-OCR's preprocessor_config.json names another normalization of images than ours to [-1, 1], it is folded
    into the patch embedding.

    Errors: CheckpointError when a file is missing or damaged, the configuration is of another model, or a weight of
    GLM-OCR is missing, extra or misshaped.
    """
    values, cfg = _read_config(directory), read_model_config(directory)
    if values["model_type"] == _MODEL_TYPE:
        return cfg, read_weights(directory, "")
    shape = _read_shape(directory, values)
    weights = glm_ocr.tower_from_glm_ocr(read_weights(directory, *_prefixes(values)), shape)
    mean, std = _read_normalization(directory)
    if (mean, std) != _OURS:
        if not len(mean) == len(std) == cfg.in_chans:
            raise CheckpointError(f"{directory / PROCESSOR}: image_mean and image_std need {cfg.in_chans} values each")
        weights = glm_ocr.fold_normalization(weights, mean, std)
    return cfg, weights


def read_model_config(directory: Path) -> CogViTConfig:
    """Read the shape of what `read_model` reads, and no weights; they are looked for. Errors: as `read_model`."""
    values = _read_config(directory)
    if values["model_type"] == _MODEL_TYPE:
        cfg = _read_own_config(directory, values)
    else:
        try:
            cfg = glm_ocr.cogvit_config(_read_shape(directory, values))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{directory / CONFIG}: {error}") from None
    if not (directory / WEIGHTS).exists() and not (directory / f"{WEIGHTS}.index.json").exists():
        raise CheckpointError(f"{directory / WEIGHTS} does not exist; is {directory} an export?")
    return cfg


def write_glm_ocr(
    directory: Path,
    shape: GlmOcrShape,
    weights: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    family: Literal["glm_ocr", "glm5_next"] = "glm_ocr",
) -> None:
    """Write weights under GLM-OCR's names for the vision model of a family, with how its images are prepared.

    Without a merger among them transformers makes a new one and says so.
    """
    write_files(directory, glm_ocr.write_shape(shape, family), weights)
    write_json(directory / PROCESSOR, {**glm_ocr.write_processor(shape), **glm_ocr.write_sizes(shape, preprocessing)})


def read_glm_adapter(directory: Path) -> tuple[GlmOcrShape, dict[str, Tensor]]:
    """Read the merger of a GLM-OCR checkpoint as the weights of a `GlmAdapter`.

    Errors: CheckpointError when a file is missing or damaged, the configuration is not GLM-OCR's, or a weight is
    missing, extra or misshaped.
    """
    values = _read_config(directory)
    if values["model_type"] == _MODEL_TYPE:
        raise CheckpointError(f"{directory} holds no merger: it is a CogViT, not a GLM-OCR")
    shape = _read_shape(directory, values)
    return shape, glm_ocr.adapter_from_glm_ocr(read_weights(directory, *_prefixes(values)), shape)


def write_text_side(directory: Path, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a text tower beside an exported encoder, with what tells how it is used."""
    write_files(directory / _TEXT_SIDE, values, weights)


def read_text_side(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read what `write_text_side` wrote; None where an export has none. Errors: CheckpointError."""
    if not (directory / _TEXT_SIDE).is_dir():
        return None
    return read_json(directory / _TEXT_SIDE / CONFIG), read_weights(directory / _TEXT_SIDE, "")


def load_checked(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set every parameter of a module from full tensors of the same names.

    Errors: CheckpointError names every missing, extra and misshaped weight, and the first that is not finite.
    """
    own = dict(module.named_parameters())
    check_shapes(weights, {name: parameter.shape for name, parameter in own.items()})
    for name in own:
        if not bool(torch.isfinite(weights[name]).all()):
            raise CheckpointError(f"the weight {name} holds NaN or infinite values: the checkpoint is damaged")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _read_config(directory: Path) -> dict[str, Any]:
    values = read_json(directory / CONFIG)
    known = (_MODEL_TYPE, glm_ocr.VISION_TYPE, glm_ocr.MODEL_TYPE)
    if "objective" in values:
        raise CheckpointError(f"{directory} is a run; python -m tools.export {directory} --out DIR makes weights of it")
    if values.get("model_type") not in known:
        raise CheckpointError(
            f"{directory / CONFIG} is not of a CogViT: model_type is {values.get('model_type')!r}; expected one of"
            f" {', '.join(known)}"
        )
    return values


def _read_own_config(directory: Path, values: dict[str, Any]) -> CogViTConfig:
    try:
        return from_json(CogViTConfig, {name: value for name, value in values.items() if name not in _NOT_OURS})
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None


def _read_shape(directory: Path, values: dict[str, Any]) -> GlmOcrShape:
    vision = values.get("vision_config") if values["model_type"] == glm_ocr.MODEL_TYPE else values
    if not isinstance(vision, dict):
        raise CheckpointError(f"{directory / CONFIG} has no vision_config; is it the whole of a GLM-OCR?")
    return glm_ocr.read_shape(vision)


def _prefixes(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands before the names of the vision tower's weights, newest form first."""
    return ("model.visual.", "visual.") if values["model_type"] == glm_ocr.MODEL_TYPE else ("",)


def read_processor(directory: Path) -> dict[str, Any]:
    """Read how GLM-OCR's images are prepared; empty where nothing is said. Errors: CheckpointError."""
    for values in (
        read_json(directory / PROCESSOR) if (directory / PROCESSOR).exists() else None,
        read_json(directory / _NESTED).get("image_processor") if (directory / _NESTED).exists() else None,
    ):
        if values is not None:
            return values
    return {}


def _read_normalization(directory: Path) -> tuple[list[float], list[float]]:
    """The mean and deviation of GLM-OCR's images; ours where nothing is said."""
    values = read_processor(directory)
    return (values.get("image_mean", _THEIRS[0]), values.get("image_std", _THEIRS[1])) if values else _OURS
