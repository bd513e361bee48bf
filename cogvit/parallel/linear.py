"""Megatron's linear layers, split over the tensor ranks, in autocast's dtype."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.parallel.pieces import compute_dtype

from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip


class _Cast:
    """Runs a linear layer in autocast's dtype: input, weight and bias, so that messages and gradients have it too.

    Where no tensor ranks share the layer, nothing travels and the bias goes into the product.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output and the bias that is still to be added."""
        layer: Any = self
        return super().forward(input_) if layer.config.tensor_model_parallel_size > 1 else self.product(input_)  # type: ignore[misc]

    def product(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return this rank's own product, of which nothing travels, and the bias that is still to be added."""
        layer: Any = self
        dtype = compute_dtype(input_)
        x, weight = input_.to(dtype), layer.weight.to(dtype)
        if layer.config.tensor_model_parallel_size > 1:
            return F.linear(x, weight), layer.bias
        return F.linear(x, weight, None if layer.bias is None else layer.bias.to(dtype)), None

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None, **megatron: Any) -> Tensor:
        dtype = compute_dtype(input)
        bias = None if bias is None else bias.to(dtype)
        layer: Any = super()
        return layer._forward_impl(input=input.to(dtype), weight=weight.to(dtype), bias=bias, **megatron)


class ColumnLinear(_Cast, ColumnParallelLinear):
    """Rows of the weight split over the tensor ranks."""


class RowLinear(_Cast, RowParallelLinear):
    """Columns of the weight split over the tensor ranks."""


def mark_shards(block: TransformerBlock) -> None:
    """Say which parameters are shards; Megatron does it inside the initialization that `megatron_config` turns off.

    DeepSpeed counts unmarked parameters once in the gradient norm, and Muon gathers marked ones over the tensor ranks.
    """
    for module in block.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            rows = isinstance(module, ColumnParallelLinear)
            mark_shard(module.weight, dim=0 if rows else 1)
            if rows and module.bias is not None:
                mark_shard(module.bias, dim=0)


def mark_shard(parameter: nn.Parameter, *, dim: int) -> None:
    """Say that a parameter is this tensor rank's part of a plain tensor that is split along a dim."""
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
