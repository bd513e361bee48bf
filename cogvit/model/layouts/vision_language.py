"""Our own layout of a vision-language model: a directory of directories, each of which loads alone.

`vision` is what `CogViT.from_pretrained` reads, `language` what `AutoModelForCausalLM` and `AutoTokenizer` of
transformers read, `adapter` holds what stands between them. `expert`, where there is one, holds what grew for images:
visual experts, the learned tokens around images, a cross module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvit.config import from_json
from cogvit.errors import CheckpointError, ConfigError
from cogvit.model.config import AdapterConfig, CrossModuleConfig, ExpertConfig, VideoConfig
from cogvit.model.layouts import glm_ocr_full
from cogvit.model.layouts.files import CONFIG, check_numbers, read_json, read_weights, write_files, write_json

VISION, ADAPTER, LANGUAGE, EXPERT = "vision", "adapter", "language", "expert"
MODEL_TYPE = "cogvit_vlm"


@dataclass(frozen=True)
class Joint:
    """What the parts do not say themselves."""

    image_token_id: int
    min_pixels: float
    max_pixels: float
    adapter: AdapterConfig
    weights: dict[str, Tensor]  # of the adapter
    video: VideoConfig


def model_type(directory: Path) -> str:
    """Return which layout a directory has. Errors: CheckpointError for one that is no vision-language model."""
    values = read_json(directory / CONFIG)
    if "objective" in values:
        raise CheckpointError(
            f"{directory} is a run; python -m tools.export {directory} --out DIR --layout vlm makes weights of it"
        )
    found = values.get("model_type")
    known = (MODEL_TYPE, glm_ocr_full.MODEL_TYPE)
    if found not in known:
        raise CheckpointError(
            f"{directory / CONFIG} is not of a vision-language model: model_type is {found!r}; expected one of"
            f" {', '.join(known)}"
        )
    return str(found)


def write(directory: Path, joint: Joint) -> None:
    """Write what the encoder and the language model do not write themselves; the directory is made."""
    write_files(directory / ADAPTER, asdict(joint.adapter), joint.weights)
    sizes = {"min_pixels": joint.min_pixels, "max_pixels": joint.max_pixels, "video": asdict(joint.video)}
    write_json(directory / CONFIG, {"model_type": MODEL_TYPE, "image_token_id": joint.image_token_id, **sizes})


def read(directory: Path) -> Joint:
    """Read what `write` wrote. Errors: CheckpointError when a file is missing or damaged or a value is none."""
    values, weights = read_json(directory / CONFIG), read_weights(directory / ADAPTER, "")
    check_numbers(directory / ADAPTER, weights)
    try:
        adapter = from_json(AdapterConfig, read_json(directory / ADAPTER / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{directory / ADAPTER / CONFIG}: {error}") from None
    try:
        video = from_json(VideoConfig, values.get("video", {}))
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: video: {error}") from None
    return Joint(
        image_token_id=int(_number(directory, values, "image_token_id")),
        min_pixels=_number(directory, values, "min_pixels"),
        max_pixels=_number(directory, values, "max_pixels"),
        adapter=adapter,
        weights=weights,
        video=video,
    )


@dataclass(frozen=True)
class Grown:
    """What image tokens have of their own beside a language model that stays as it was."""

    expert: ExpertConfig
    framed: bool  # learned tokens around images, under `frame.*`
    weights: dict[str, Tensor]
    cross: CrossModuleConfig = field(default_factory=CrossModuleConfig)  # its encoder under `cross.*`

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self.framed or self.expert.every > 0 or self.cross.image_size > 0


def write_expert(directory: Path, grown: Grown) -> None:
    """Write what grew beside a language model."""
    values = {**asdict(grown.expert), "framed": grown.framed}
    if grown.cross.image_size:
        values["cross"] = asdict(grown.cross)
    write_files(directory / EXPERT, values, grown.weights)


def read_expert(directory: Path) -> Grown:
    """Read what `write_expert` wrote; nothing where it wrote nothing. Errors: CheckpointError."""
    if not (directory / EXPERT).is_dir():
        return Grown(ExpertConfig(), False, {})
    values, weights = read_json(directory / EXPERT / CONFIG), read_weights(directory / EXPERT, "")
    check_numbers(directory / EXPERT, weights)
    framed, cross = values.pop("framed", False) is True, values.pop("cross", {})
    try:
        return Grown(from_json(ExpertConfig, values), framed, weights, from_json(CrossModuleConfig, cross))
    except ConfigError as error:
        raise CheckpointError(f"{directory / EXPERT / CONFIG}: {error}") from None


def _number(directory: Path, values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{directory / CONFIG}: {name}={value!r} must be a number")
    return value
