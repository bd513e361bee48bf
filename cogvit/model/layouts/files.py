"""A directory of config.json and safetensors, the form in which weights travel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvit.errors import CheckpointError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # where they are split
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_files(directory: Path, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors; the directory is made."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, values)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # safetensors' own is 0600 whatever the umask


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Errors: CheckpointError when the file is missing or holds none."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; is {path.parent} an export?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def read_weights(directory: Path, *prefixes: str) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, or of its parts, whose names begin with a prefix, without it.

    Errors: CheckpointError when a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    for path in (directory / name for name in part_names(directory)):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for prefix in prefixes:
                    found = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
                    weights.update({name.removeprefix(prefix): weight for name, weight in found.items()})
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; is {directory} an export?") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
    return weights


def weight_places(directory: Path) -> dict[str, Path]:
    """Return which file holds each tensor, reading none. Errors: CheckpointError when one is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    for path in (directory / name for name in part_names(directory)):
        try:
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; is {directory} an export?") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
    return places


def part_names(directory: Path) -> list[str]:
    """Return the files of a directory that hold weights: model.safetensors, or its parts where it is split.

    Errors: CheckpointError when the index names none, or one that lies elsewhere.
    """
    index = directory / INDEX
    if not index.exists():
        return [WEIGHTS]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{index}: weight_map must say in which file each weight is")
    foreign = [name for name in named.values() if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{index}: {foreign[0]!r} is no file beside it")
    return sorted(set(named.values()))


def check_numbers(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Look at what was read. Errors: CheckpointError names weights that are no floats, NaN or infinite."""
    kinds = {name: weight.dtype for name, weight in weights.items()}
    foreign = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _FLOATS]
    if foreign:
        raise CheckpointError(
            f"{directory} holds weights that are no floats of 16 bits or more: {_some(foreign)}; quantized models"
            " must be converted first"
        )
    broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight.sum(dtype=torch.float64)))]
    if broken:
        raise CheckpointError(f"{directory} holds NaN or infinite values in {_some(broken)}; take another copy of it")


def _some(problems: list[str]) -> str:
    more = len(problems) - 3
    return ", ".join(problems[:3]) + (f" and {more} more" if more > 0 else "")
