"""The blocks of a causal language model as Megatron-core transformer layers, on packed sequences.

Each layer computes what `cogvit.model.decoder.DecoderBlock` computes; `convert.py` maps the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cogvit.config import ActivationConfig
from cogvit.model.decoder import CausalLayout
from cogvit.model.language_config import LanguageConfig
from cogvit.parallel.causal import CausalSelfAttention
from cogvit.parallel.cross import CrossAttentionOnRows
from cogvit.parallel.expert import ExpertMLP, ExpertProjections, ExpertSelfAttention
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.pieces import Pieces
from cogvit.parallel.trunk import (
    LayersShape,
    PackedMLP,
    PackedStream,
    TensorSyncedNorm,
    build_layers,
    layer_parts,
)

from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # isort: skip
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


class CausalBranch(nn.Module):
    """Megatron's bias-dropout-add slot: the bias, and the sandwich norm where a family has it."""

    pieces = Pieces()

    def __init__(self, config: TransformerConfig, *, sandwich_norm: bool) -> None:
        super().__init__()
        self.sync = config.sequence_parallel
        self.norm = None
        if sandwich_norm:
            self.norm = TensorSyncedNorm(config, config.hidden_size, config.layernorm_epsilon, "rmsnorm", self.sync)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that adds the branch to the residual, as Megatron asks for it."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            if bias is not None and self.sync:
                bias = copy_to_tensor_model_parallel_region(bias)
            if self.norm is not None:
                x, bias = self.norm(x if bias is None else x + bias.to(x.dtype)), None
            return self.pieces.with_branch(residual, x, bias, None, None)

        return add


class DecoderLayer(TransformerLayer):
    """A Megatron layer whose branches may be normalized before they are added."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, sandwich_norm: bool, **megatron: Any
    ) -> None:
        super().__init__(config, submodules, **megatron)
        # Megatron turns gradients on around the residual branches even in a forward-only pass; ours must not.
        self.bias_dropout_add_exec_handler = nullcontext
        self.self_attn_bda = CausalBranch(config, sandwich_norm=sandwich_norm)
        self.mlp_bda = CausalBranch(config, sandwich_norm=sandwich_norm)
        if isinstance(self.cross_attention, CrossAttentionOnRows):
            self.cross_attn_bda = CausalBranch(config, sandwich_norm=False)

    def forward(self, *args: Any, packed_seq_params: PackedStream, **kwargs: Any) -> Any:
        """Run the layer; what Megatron does not tell of the pack of this call is told here."""
        layout = packed_seq_params.layout
        assert isinstance(layout, CausalLayout)
        if isinstance(self.mlp, ExpertMLP):
            self.mlp.rows = layout.expert
        if isinstance(self.cross_attention, CrossAttentionOnRows):
            self.cross_attention.layout = layout
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def decoder_shape(cfg: LanguageConfig) -> LayersShape:
    """Return the shape of a language model's layers."""
    return LayersShape(
        depth=cfg.depth,
        embed_dim=cfg.embed_dim,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        mlp_dim=cfg.mlp_dim,
        norm="rmsnorm",
        eps=cfg.eps,
        gated=True,
        qk_norm=cfg.qk_norm,
        biases=cfg.qkv_bias or cfg.proj_bias or cfg.mlp_bias or cfg.expert.qkv_bias,
    )


def build_decoder(
    cfg: LanguageConfig, config: TransformerConfig, mesh: Mesh, memory: ActivationConfig, pieces: Pieces
) -> TransformerBlock:
    """Return this stage's share of a language model's layers, without the final norm."""

    def layer(has_expert: bool) -> ModuleSpec:
        attention, mlp = (ExpertSelfAttention, ExpertMLP) if has_expert else (CausalSelfAttention, PackedMLP)
        parts = layer_parts(config, mesh, attention, AttnMaskType.causal, "rmsnorm", cfg.qk_norm, mlp)
        if cfg.cross.dim:
            cross = ModuleSpec(CrossAttentionOnRows, params={"cross": cfg.cross})
            parts = replace(parts, pre_cross_attn_layernorm=parts.input_layernorm, cross_attention=cross)
        return ModuleSpec(DecoderLayer, params={"sandwich_norm": cfg.sandwich_norm}, submodules=parts)

    size = cfg.depth // mesh.pp_size
    here = range(mesh.pp_rank * size, (mesh.pp_rank + 1) * size)
    block = build_layers([layer(cfg.has_expert(number)) for number in here], config, mesh, memory, pieces)
    # Megatron's layers have all biases or none; families choose.
    for module in block.modules():
        if isinstance(module, CausalSelfAttention):
            module.interleaved = cfg.interleaved_rotary
            _keep_bias(module.linear_qkv, cfg.qkv_bias)
            _keep_bias(module.linear_proj, cfg.proj_bias)
        elif isinstance(module, ExpertProjections):
            _keep_bias(module.qkv, cfg.qkv_bias or cfg.expert.qkv_bias)
            _keep_bias(module.proj, cfg.proj_bias)
        elif isinstance(module, PackedMLP):
            _keep_bias(module.linear_fc1, cfg.mlp_bias)
            _keep_bias(module.linear_fc2, cfg.mlp_bias)
        elif isinstance(module, CrossAttentionOnRows):
            module.recompute = memory.recompute == "selective"
    return block


def _keep_bias(linear: nn.Module, keep: bool) -> None:
    if not keep:
        linear.register_parameter("bias", None)
