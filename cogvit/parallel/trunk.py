"""The block stack as Megatron-core transformer layers: tensor, pipeline and sequence parallel, on packed tokens.

Each layer computes what `cogvit.model.blocks.Block` computes; `convert.py` maps the weights. Where Megatron relies on
its own trainer to repair gradients (QK-norm under tensor parallelism; norms, row biases and LayerScale under sequence
parallelism), the parameters here pass through `copy_to_tensor_model_parallel_region`, whose backward sums over the
tensor ranks, because DeepSpeed never runs that repair.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.config import ActivationConfig
from cogvit.model.attention import packed_attention
from cogvit.model.blocks import ATTENTION_BRANCH, MLP_BRANCH, depth_scale, drop_rate
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.position import apply_rotary
from cogvit.model.tokens import PackedLayout
from cogvit.parallel.mesh import Mesh

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

TowerConfig = CogViTConfig | TextConfig


@dataclass
class PackedStream(PackedSeqParams):
    """What every layer needs beside the hidden states, in the place where Megatron carries packing."""

    layout: PackedLayout | None = None  # of all S tokens, for attention
    local: PackedLayout | None = None  # of this rank's tokens under sequence parallelism, for stochastic depth


class TensorSyncedNorm(nn.Module):
    """A norm whose replicated weight gets the tensor ranks' summed gradients where each sees a part of the input."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        kind: Literal["layernorm", "rmsnorm"],
        sync: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if kind == "layernorm" else None
        self.eps, self.sync = eps, sync

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        weight, bias = self.weight, self.bias
        if self.sync:
            weight = copy_to_tensor_model_parallel_region(weight)
            bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class PackedCoreAttention(nn.Module):
    """Megatron's core-attention slot, filled with the plain model's rotary positions and packed attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedStream | None = None,
    ) -> Tensor:
        """Attend within each image: [S, H / tp, K] in and out."""
        assert packed_seq_params is not None and packed_seq_params.layout is not None
        layout = packed_seq_params.layout
        if layout.cos_SK is not None and layout.sin_SK is not None:
            query = apply_rotary(query, layout.cos_SK, layout.sin_SK)
            key = apply_rotary(key, layout.cos_SK, layout.sin_SK)
        return packed_attention(query, key, value, layout.segments)


class RecomputedMLP(MLP):
    """An MLP that is done again in backward; with the attention's own recompute this is the "selective" choice.

    Megatron's recompute of the MLP returns the bias parameter through a custom autograd function, which gives the
    parameter a history and makes backward recurse for ever.
    """

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output without its bias, and the bias."""

        def output(x: Tensor) -> Tensor:
            return MLP.forward(self, x)[0]

        return checkpoint(output, hidden_states, use_reentrant=False), self.linear_fc2.bias


class ResidualBranch(nn.Module):
    """Megatron's bias-dropout-add slot: bias, LayerScale and stateless stochastic depth of one residual branch."""

    def __init__(self, tower: TowerConfig, *, layer: int, branch: int, sync: bool) -> None:
        super().__init__()
        self.layer, self.branch, self.sync = layer, branch, sync
        self.rate = drop_rate(tower.drop_path_rate, layer, tower.depth)
        scale = tower.layer_scale_init
        self.gamma = None if scale is None else nn.Parameter(torch.full((tower.embed_dim,), scale))
        self.local: PackedLayout | None = None  # of the call under way

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that adds the branch to the residual, as Megatron asks for it."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            gamma = self.gamma
            if self.sync:
                bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
                gamma = None if gamma is None else copy_to_tensor_model_parallel_region(gamma)
            x = x if bias is None else x + bias
            x = x if gamma is None else x * gamma
            if training and self.rate > 0.0:
                assert self.local is not None
                scale_S = depth_scale(self.local, self.rate, self.layer, self.branch)
                x = x * scale_S[:, None, None].to(x.dtype)
            return residual + x

        return add


class CogViTLayer(TransformerLayer):
    """A Megatron layer with LayerScale and stateless stochastic depth on its residual branches."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, tower: TowerConfig, **megatron: Any
    ) -> None:
        super().__init__(config, submodules, **megatron)
        # Megatron turns gradients on around the residual branches even in a forward-only pass; ours must not.
        self.bias_dropout_add_exec_handler = nullcontext
        layer, sync = self.layer_number - 1, config.sequence_parallel
        self.self_attn_bda = ResidualBranch(tower, layer=layer, branch=ATTENTION_BRANCH, sync=sync)
        self.mlp_bda = ResidualBranch(tower, layer=layer, branch=MLP_BRANCH, sync=sync)

    def forward(self, *args: Any, packed_seq_params: PackedStream, **kwargs: Any) -> Any:
        """Run the layer; the branches draw by the packing of this call (recompute calls again with the same)."""
        self.self_attn_bda.local = self.mlp_bda.local = packed_seq_params.local
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def local_layout(layout: PackedLayout, mesh: Mesh, sequence: bool) -> PackedLayout:
    """Return the layout as stochastic depth sees it: under sequence parallelism, of this rank's share of the tokens."""
    return replace(layout, slot_S=layout.slot_S.chunk(mesh.tp_size)[mesh.tp_rank]) if sequence else layout


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform"},
}


def megatron_config(tower: TowerConfig, mesh: Mesh, memory: ActivationConfig, *, sequence: bool) -> TransformerConfig:
    """Translate a tower's shape and the layout into Megatron's configuration; `RunConfig.check` refused the rest."""
    return TransformerConfig(
        num_layers=tower.depth,
        hidden_size=tower.embed_dim,
        num_attention_heads=tower.num_heads,
        ffn_hidden_size=tower.mlp_dim,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        sequence_parallel=sequence,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,  # weights come from convert.fill
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        qk_layernorm=tower.use_qk_norm,
        add_qkv_bias=True,
        add_bias_linear=True,
        normalization="LayerNorm" if tower.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=tower.eps,
        gated_linear_unit=tower.mlp == "swiglu",
        activation_func=F.silu if tower.mlp == "swiglu" else F.gelu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=True,
        recompute_num_layers=memory.recompute_blocks if memory.recompute == "full" else None,
        **_RECOMPUTE[memory.recompute],
    )


def build_trunk(tower: TowerConfig, config: TransformerConfig, mesh: Mesh) -> TransformerBlock:
    """Return this stage's share of the tower's layers, without a final norm."""
    norm = ModuleSpec(TensorSyncedNorm, params={"kind": tower.norm, "sync": config.sequence_parallel})
    # Each tensor rank normalizes its own heads with the shared weight: QK-norm is synced under any tensor parallelism.
    head_norm = ModuleSpec(TensorSyncedNorm, params={"kind": tower.norm, "sync": mesh.tp_size > 1})
    qk_norm = head_norm if tower.use_qk_norm else None
    layer = ModuleSpec(
        CogViTLayer,
        params={"tower": tower},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedCoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                RecomputedMLP if config.recompute_granularity == "selective" else MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
        ),
    )
    block = TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * (tower.depth // mesh.pp_size), layer_norm=IdentityOp),
        post_layer_norm=False,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
    )
    _mark_shards(block)
    return block


def _mark_shards(block: TransformerBlock) -> None:
    """Say which parameters are shards; Megatron does it inside the initialization that `megatron_config` turns off.

    DeepSpeed counts unmarked parameters once in the gradient norm, and Muon gathers marked ones over the tensor ranks.
    """
    for module in block.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            rows = isinstance(module, ColumnParallelLinear)
            _mark_shard(module.weight, dim=0 if rows else 1)
            if rows:
                _mark_shard(module.bias, dim=0)


def _mark_shard(parameter: nn.Parameter, *, dim: int) -> None:
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
