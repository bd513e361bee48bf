"""Initial weights as a pure function of (seed, plain parameter name, shape).

Any layout can therefore make its own slice of the very tensor that a single process would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvit.draws import mix, name_to_int64

_STD = 0.02


def init_tensor(name: str, shape: Sequence[int], seed: int, layer_scale: float = 1.0) -> Tensor:
    """Return the full fp32 tensor that a parameter starts from.

    Biases and the output of cross attention are 0, norm weights 1, LayerScale gammas `layer_scale`; embeddings, tables
    and tokens are normal with a standard deviation of 0.02, other matrices with fan_in ** -0.5: 0.03 at the width of
    1024, where the reference has 0.02, and still a signal at the widths of small models.
    """
    with torch.device("cpu"):
        if name.endswith("gamma"):
            return torch.full(tuple(shape), layer_scale)
        if name.endswith("bias"):
            return torch.zeros(tuple(shape))
        if name.endswith("cross.proj.weight"):  # a block with cross attention begins as the block without
            return torch.zeros(tuple(shape))
        if len(shape) == 1:
            return torch.ones(tuple(shape))
        generator = torch.Generator().manual_seed(int(mix(torch.tensor(name_to_int64(name)), seed)))
        embeds = name.endswith(("embed.weight", "embed", "token"))
    std = _STD if embeds else math.prod(shape[1:]) ** -0.5
    return torch.empty(tuple(shape)).normal_(std=std, generator=generator)


def init_model(module: nn.Module, seed: int, prefix: str = "", layer_scale: float | None = None) -> None:
    """Set every parameter of a module by `init_tensor`; `prefix` stands before its names.

    A module on the meta device is left as it is.
    """
    scale = 1.0 if layer_scale is None else layer_scale
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(init_tensor(prefix + name, parameter.shape, seed, scale))
