"""Weights under other names: a key map says of which tensors there each of ours is stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cogvit.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
Parts = dict[str, Shapes]  # our name of a weight -> the names and shapes there, whose rows it stacks


def flat(parts: Parts) -> Shapes:
    """Return the names and shapes there."""
    return {name: size for theirs in parts.values() for name, size in theirs.items()}


def stack(weights: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Return weights under our names, as fp32 copies.

    Errors: CheckpointError names every missing, extra and misshaped weight.
    """
    check_shapes(weights, flat(parts))
    return {ours: torch.cat([weights[name].float() for name in theirs]) for ours, theirs in parts.items()}


def split(weights: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Return our weights under the names there, in fp32.

    Rows that do not add up are cut in equal parts, whose shapes `check_shapes` then names.
    """
    theirs: dict[str, Tensor] = {}
    for ours, sizes in parts.items():
        weight, rows = weights[ours].float(), [size[0] for size in sizes.values()]
        cut = weight.split(rows) if sum(rows) == len(weight) else weight.chunk(len(rows))
        theirs.update(zip(sizes, cut, strict=True))
    return theirs


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Compare weights with the names and shapes that a model has.

    Errors: CheckpointError names every missing, extra and misshaped weight.
    """
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(problems)}")
