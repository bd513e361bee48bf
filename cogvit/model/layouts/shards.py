"""Weights in one file or many, read one tensor at a time and written one file at a time: nobody holds them twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.layouts.files import CONFIG, INDEX, WEIGHTS, part_names, write_json

_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """What a directory's headers say of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Return what is stored, without reading it.

    Errors: CheckpointError when a file is missing or damaged, or a tensor is no float of 16 bits or more.
    """
    found = {}
    for file in part_names(directory):
        with _opened(directory / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                if (kind := part.get_dtype()) not in _DTYPES:
                    raise CheckpointError(
                        f"{directory / file}: {name} is {kind}, no float of 16 bits or more; quantized models must be"
                        " converted first"
                    )
                found[name] = Stored(file, tuple(part.get_shape()), _DTYPES[kind])
    return found


def tensors(directory: Path, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, one at a time. Errors: CheckpointError names one that holds NaN or infinite values."""
    for file in sorted({entry.file for entry in stored.values()}):
        with _opened(directory / file) as opened:
            for name in (name for name, entry in stored.items() if entry.file == file):
                tensor = opened.get_tensor(name)
                if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                    raise CheckpointError(
                        f"{directory / file} holds NaN or infinite values in {name}; take another copy of it"
                    )
                yield name, tensor


def write_tensors(directory: Path, plan: Mapping[str, Stored], tensor: Callable[[str], Tensor]) -> None:
    """Write tensors to the files that a plan says, one file at a time, with an index where they are several.

    Args:
        directory: where to; config.json lies there already.
        plan: file, shape and dtype of every tensor.
        tensor: gives one by its name.
    """
    from safetensors.torch import save_file

    for file in sorted({entry.file for entry in plan.values()}):
        own = {name: entry for name, entry in plan.items() if entry.file == file}
        held = {name: tensor(name).detach().to("cpu", entry.dtype).contiguous() for name, entry in own.items()}
        save_file(held, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / file)  # safetensors' own is 0600 whatever the umask
    if {entry.file for entry in plan.values()} != {WEIGHTS}:
        weight_map = {name: plan[name].file for name in sorted(plan)}
        write_json(directory / INDEX, {"metadata": {"total_size": _size_bytes(plan)}, "weight_map": weight_map})


def planned(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Stored]:
    """Return a plan for new files of up to 5 GB, tensors in the order given."""
    filled: list[dict[str, tuple[int, ...]]] = [{}]
    room = _SHARD_BYTES
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > room and filled[-1]:
            filled.append({})
            room = _SHARD_BYTES
        filled[-1][name] = shape
        room -= size
    if len(filled) == 1:
        return {name: Stored(WEIGHTS, shape, dtype) for name, shape in filled[0].items()}
    return {
        name: Stored(f"model-{number:05}-of-{len(filled):05}.safetensors", shape, dtype)
        for number, own in enumerate(filled, 1)
        for name, shape in own.items()
    }


def _size_bytes(plan: Mapping[str, Stored]) -> int:
    return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in plan.values())


def _opened(path: Path) -> Any:
    """An open file of safetensors, which has no types. Errors: CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} whole?") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
