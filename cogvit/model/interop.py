"""Weights on disk as others read them: a directory of config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor, nn

from cogvit.errors import CheckpointError
from cogvit.model.config import CogViTConfig

_CONFIG, _WEIGHTS, _MODEL_TYPE = "config.json", "model.safetensors", "cogvit"


def write_model(directory: Path, cfg: CogViTConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a vision encoder's config.json and model.safetensors; the directory is made."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    values = {"model_type": _MODEL_TYPE, **asdict(cfg)}
    (directory / _CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, directory / _WEIGHTS)


def read_model(directory: Path) -> tuple[CogViTConfig, dict[str, Tensor]]:
    """Read what `write_model` wrote.

    Errors: CheckpointError when a file is missing or damaged or the configuration is not a CogViT's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    cfg = _read_config(directory / _CONFIG)
    try:
        return cfg, load_file(directory / _WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{directory / _WEIGHTS} does not exist; is {directory} an export?") from None
    except SafetensorError as error:
        raise CheckpointError(f"{directory / _WEIGHTS} is damaged: {error}") from None


def _read_config(path: Path) -> CogViTConfig:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} an export?") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("model_type", None) != _MODEL_TYPE:
        raise CheckpointError(f"{path} is not of a CogViT: expected model_type {_MODEL_TYPE!r}")
    unknown = sorted(set(values) - {field.name for field in fields(CogViTConfig)})
    if unknown:
        raise CheckpointError(f"{path} has the unknown field {unknown[0]!r}")
    try:
        return CogViTConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_checked(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set every parameter of a module from full tensors of the same names.

    Errors: CheckpointError names every missing, extra and misshaped weight.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(weight.shape)}"
        for name, weight in own.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(problems)}")
    module.load_state_dict(weights)
