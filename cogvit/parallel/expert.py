"""Visual experts in Megatron's layers: the twin of `cogvit.model.expert`.

Each tensor rank sends all tokens of a pack their ways: under sequence parallelism its share is gathered first and what
comes out is scattered, as Megatron's own layers do it, and between the two every token is computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cogvit.model.expert import ExpertRows, routed
from cogvit.parallel.causal import CausalSelfAttention
from cogvit.parallel.linear import ColumnLinear, RowLinear
from cogvit.parallel.pieces import compute_dtype
from cogvit.parallel.trunk import PackedMLP, PackedStream, checkpointed

from megatron.core.tensor_parallel.mappings import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


def gathered(x_S1D: Tensor, config: TransformerConfig) -> Tensor:
    """Return all tokens of a pack where this rank has a share; their gradient is summed over the tensor ranks."""
    x_S1D = x_S1D.to(compute_dtype(x_S1D))
    if config.tensor_model_parallel_size == 1:
        return x_S1D
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x_S1D)
    return copy_to_tensor_model_parallel_region(x_S1D)


def summed(x_S1D: Tensor, rows: ExpertRows, language: RowLinear, expert: RowLinear) -> Tensor:
    """Return the sum over the tensor ranks of their parts of all tokens, with each token's own bias.

    Under sequence parallelism it is this rank's share.
    """
    config, bias, own = language.config, language.bias, expert.bias
    if config.tensor_model_parallel_size == 1:
        return x_S1D
    is_own_S11 = (rows.place_S >= rows.num_language).view(-1, 1, 1)
    if config.sequence_parallel:
        x_S1D = reduce_scatter_to_sequence_parallel_region(x_S1D)
        is_own_S11 = is_own_S11.chunk(config.tensor_model_parallel_size)[language.tp_group.rank()]
    else:
        x_S1D = reduce_from_tensor_model_parallel_region(x_S1D)
    if bias is None or own is None:
        return x_S1D
    if config.sequence_parallel:
        bias, own = copy_to_tensor_model_parallel_region(bias), copy_to_tensor_model_parallel_region(own)
    return x_S1D + torch.where(is_own_S11, own, bias).to(x_S1D.dtype)


class ExpertProjections(nn.Module):
    """What image tokens have instead of the language model's projections around its attention."""

    def __init__(self, attention: CausalSelfAttention) -> None:
        super().__init__()
        config, group = attention.config, attention.pg_collection.tp
        width, biases = config.hidden_size, config.add_bias_linear
        shared = {"config": config, "bias": biases, "is_expert": False, "tp_group": group}
        self.qkv = ColumnLinear(
            width, attention.linear_qkv_out_dim, init_method=config.init_method, gather_output=False, **shared
        )
        self.proj = RowLinear(
            attention.query_projection_size,
            width,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **shared,
        )


class ExpertSelfAttention(CausalSelfAttention):
    """Attention of text and images together; image tokens have their own projections into it and out of it."""

    def __init__(self, *args: Any, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.expert = ExpertProjections(self)

    def forward(
        self, hidden_states: Tensor, attention_mask: None, *, packed_seq_params: PackedStream, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each sequence: [S, 1, D] in; the output and no bias."""
        layout: Any = packed_seq_params.layout
        rows, expert = layout.expert, self.expert
        qkv_S1F = routed(
            gathered(hidden_states, self.config),
            rows,
            lambda x: _with_bias(self.linear_qkv, x),
            lambda x: _with_bias(expert.qkv, x),
        )
        out_SF = checkpointed(self._attend, qkv_S1F, layout) if self.recompute else self._attend(qkv_S1F, layout)
        part_S1D = routed(
            out_SF.unsqueeze(1), rows, lambda x: self.linear_proj.product(x)[0], lambda x: expert.proj.product(x)[0]
        )
        return summed(part_S1D, rows, self.linear_proj, expert.proj), None


class ExpertMLP(PackedMLP):
    """The language model's MLP for text, and one of its own for image tokens."""

    def __init__(self, *args: Any, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.expert = PackedMLP(*args, **megatron)
        self.rows: ExpertRows | None = None  # of the call under way

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output and no bias."""
        assert self.rows is not None, "a layer with an expert is told whose tokens are whose"
        if self.recompute:
            return checkpointed(self._routed, hidden_states, self.rows), None
        return self._routed(hidden_states, self.rows), None

    def _routed(self, x_S1D: Tensor, rows: ExpertRows) -> Tensor:
        part_S1D = routed(gathered(x_S1D, self.config), rows, self.product, self.expert.product)
        return summed(part_S1D, rows, self.linear_fc2, self.expert.linear_fc2)


def _with_bias(linear: ColumnLinear, x: Tensor) -> Tensor:
    y, bias = linear.product(x)
    return y if bias is None else y + bias.to(y.dtype)
