"""A causal language model of transformers on disk, of whose weights one is read at a time.

Every rank of a run cuts its slice out of whole tensors; none has to hold the whole model for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.layouts.causal_lm import causal_lm_parts, read_shape
from cogvit.model.layouts.files import check_numbers, weight_places


class CausalLMFile(Mapping[str, Tensor]):
    """`CausalLM`'s weights in fp32 under its names, behind a prefix. Heads for more tokens are left out.

    Errors: CheckpointError when a file is missing or damaged, the family or an option is not ours or weights are
    missing; and when one is read that has another shape, is no float, NaN or infinite.
    """

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._directory, self._prefix = directory, prefix
        self._parts = causal_lm_parts(read_shape(directory))
        self._places = weight_places(directory)
        missing = [name for theirs in self._parts.values() for name in theirs if name not in self._places]
        if missing:
            raise CheckpointError(f"{directory}: the weights do not fit the model: {missing[0]} is missing")

    def __getitem__(self, name: str) -> Tensor:
        theirs = self._parts[name.removeprefix(self._prefix)] if name.startswith(self._prefix) else {}
        if not theirs:
            raise KeyError(name)
        return torch.cat([self._read(one, shape) for one, shape in theirs.items()])

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith(self._prefix) and name[len(self._prefix) :] in self._parts

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{self._directory}: {name} has shape {tuple(weight.shape)}, expected {shape}")
        check_numbers(self._directory, {name: weight})
        return weight.float()
