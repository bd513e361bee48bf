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

from cogvit.config import ActivationConfig, ParallelConfig
from cogvit.model.attention import packed_attention
from cogvit.model.blocks import ATTENTION_BRANCH, MLP_BRANCH, depth_scale, drop_rate, has_norm_after
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.decoder import CausalLayout
from cogvit.model.feedforward import tiled_mlp, trains_on_cpu
from cogvit.model.tokens import PackedLayout
from cogvit.parallel.linear import ColumnLinear, RowLinear, mark_shards
from cogvit.parallel.mesh import Mesh
from cogvit.parallel.pieces import Pieces, Weights, activated, compute_dtype

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # isort: skip
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

    layout: PackedLayout | CausalLayout | None = None  # of all S tokens, for attention
    local: PackedLayout | None = None  # of this rank's tokens under sequence parallelism, for stochastic depth


class TensorSyncedNorm(nn.Module):
    """A norm whose replicated weight gets the tensor ranks' summed gradients where each sees a part of the input."""

    pieces = Pieces()

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

    def synced(self) -> Weights:
        """Return weight and bias as a forward uses them."""
        weight, bias = self.weight, self.bias
        if self.sync:
            weight = copy_to_tensor_model_parallel_region(weight)
            bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim in fp32; gives autocast's dtype."""
        return self.pieces.normalized(x, self.synced(), self.eps, compute_dtype(x))


class PackedSelfAttention(SelfAttention):
    """The plain model's attention on Megatron's linear layers: QK-norm, rotary positions, each image by itself."""

    recompute = False  # do it again in backward, from the fused q, k, v
    pieces = Pieces()

    def forward(
        self, hidden_states: Tensor, attention_mask: None, *, packed_seq_params: PackedStream, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each image: [S, 1, D] in; output without its bias, and the bias."""
        qkv_S1F, _ = self.linear_qkv(hidden_states)
        layout = packed_seq_params.layout
        assert layout is not None
        out_SF = checkpointed(self._attend, qkv_S1F, layout) if self.recompute else self._attend(qkv_S1F, layout)
        return self.linear_proj(out_SF.unsqueeze(1))

    def _attend(self, qkv_S1F: Tensor, layout: Any) -> Tensor:
        by_head_SHF = qkv_S1F.view(len(qkv_S1F), self.num_attention_heads_per_partition, -1)
        q_SHK, k_SHK, v_SHK = by_head_SHF.chunk(3, dim=-1)
        norms = None if self.q_layernorm is None else (self.q_layernorm.synced(), self.k_layernorm.synced())
        angles = None if layout.cos_SK is None or layout.sin_SK is None else (layout.cos_SK, layout.sin_SK)
        q_SHK, k_SHK = self.pieces.heads(
            q_SHK, k_SHK, norms, angles, self.config.layernorm_epsilon, compute_dtype(q_SHK)
        )
        return packed_attention(q_SHK, k_SHK, v_SHK, layout.segments).flatten(1)


class PackedMLP(MLP):
    """The plain model's MLP on Megatron's linear layers."""

    recompute = False  # do it again in backward, from its input
    pieces = Pieces()

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the bias that is still to be added."""
        out_S1D = checkpointed(self._output, hidden_states) if self.recompute else self._output(hidden_states)
        return out_S1D, self.linear_fc2.bias if self.config.tensor_model_parallel_size > 1 else None

    def _output(self, x_S1D: Tensor) -> Tensor:
        fc1, fc2, gated = self.linear_fc1, self.linear_fc2, self.config.gated_linear_unit
        plain = self.config.tensor_model_parallel_size == 1 and self.pieces.activated is activated
        if plain and trains_on_cpu(x_S1D) and fc1.weight.requires_grad:
            return tiled_mlp(x_S1D.squeeze(1), fc1, fc2, gated=gated).unsqueeze(1)
        h_S1F, bias_F = fc1(x_S1D)
        return fc2(self.pieces.activated(h_S1F, bias_F, gated=gated))[0]

    def product(self, x_S1D: Tensor) -> Tensor:
        """Return this rank's own part of the output, of which nothing travels; without a bias that is to be added."""
        h_S1F, bias_F = self.linear_fc1.product(x_S1D)
        return self.linear_fc2.product(self.pieces.activated(h_S1F, bias_F, gated=self.config.gated_linear_unit))[0]


def checkpointed(run: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a function of which backward keeps the inputs alone, and which it does again under the autocast of now.

    No draw of ours comes from a generator, so none is wound back. Megatron's own checkpoint restores no autocast.
    """
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


class ResidualBranch(nn.Module):
    """Megatron's bias-dropout-add slot: bias, a norm, LayerScale and stateless stochastic depth of a branch."""

    pieces = Pieces()

    def __init__(self, tower: TowerConfig, config: TransformerConfig, *, layer: int, branch: int) -> None:
        super().__init__()
        sync = config.sequence_parallel
        self.layer, self.branch, self.sync = layer, branch, sync
        self.rate = drop_rate(tower.drop_path_rate, layer, tower.depth)
        scale = tower.layer_scale_init
        self.gamma = None if scale is None else nn.Parameter(torch.full((tower.embed_dim,), scale))
        self.after = None
        if has_norm_after(tower):
            self.after = TensorSyncedNorm(config, tower.embed_dim, tower.eps, tower.norm, sync)
        self.local: PackedLayout | None = None  # of the call under way

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that adds the branch to the residual, as Megatron asks for it."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            gamma = self.gamma
            if self.sync:
                bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
                gamma = None if gamma is None else copy_to_tensor_model_parallel_region(gamma)
            if self.after is not None:
                x, bias = self.after(x if bias is None else x + bias.to(x.dtype)), None
            scale_S = None
            if training and self.rate > 0.0:
                assert self.local is not None
                scale_S = depth_scale(self.local, self.rate, self.layer, self.branch)
            return self.pieces.with_branch(residual, x, bias, gamma, scale_S)

        return add


class CogViTLayer(TransformerLayer):
    """A Megatron layer with LayerScale and stateless stochastic depth on its residual branches."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, tower: TowerConfig, **megatron: Any
    ) -> None:
        super().__init__(config, submodules, **megatron)
        # Megatron turns gradients on around the residual branches even in a forward-only pass; ours must not.
        self.bias_dropout_add_exec_handler = nullcontext
        layer = self.layer_number - 1
        self.self_attn_bda = ResidualBranch(tower, config, layer=layer, branch=ATTENTION_BRANCH)
        self.mlp_bda = ResidualBranch(tower, config, layer=layer, branch=MLP_BRANCH)

    def forward(self, *args: Any, packed_seq_params: PackedStream, **kwargs: Any) -> Any:
        """Run the layer; the branches draw by the packing of this call (recompute calls again with the same)."""
        self.self_attn_bda.local = self.mlp_bda.local = packed_seq_params.local
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def local_layout(layout: PackedLayout, mesh: Mesh, sequence: bool) -> PackedLayout:
    """Return the layout as stochastic depth sees it: under sequence parallelism, of this rank's share of the tokens."""
    return replace(layout, slot_S=layout.slot_S.chunk(mesh.tp_size)[mesh.tp_rank]) if sequence else layout


class CogViTBlock(TransformerBlock):
    """Megatron's block; what it recomputes in full runs under the autocast of its first run."""

    def _checkpointed_forward(self, hidden_states: Tensor, *, packed_seq_params: PackedStream, **unused: Any) -> Tensor:
        def run(x_S1D: Tensor, first: int) -> Tensor:
            for layer in self.layers[first : first + self.config.recompute_num_layers]:
                x_S1D, _ = layer(hidden_states=x_S1D, attention_mask=None, packed_seq_params=packed_seq_params)
            return x_S1D

        for first in range(0, len(self.layers), self.config.recompute_num_layers):
            hidden_states = checkpointed(run, hidden_states, first)
        return hidden_states


@dataclass(frozen=True)
class LayersShape:
    """What Megatron is told of a stack of layers."""

    depth: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm: Literal["layernorm", "rmsnorm"]
    eps: float
    gated: bool
    qk_norm: bool
    biases: bool


def tower_shape(tower: TowerConfig) -> LayersShape:
    """Return the shape of a tower's layers."""
    return LayersShape(
        depth=tower.depth,
        embed_dim=tower.embed_dim,
        num_heads=tower.num_heads,
        num_kv_heads=tower.num_heads,
        head_dim=tower.head_dim,
        mlp_dim=tower.mlp_dim,
        norm=tower.norm,
        eps=tower.eps,
        gated=tower.mlp == "swiglu",
        qk_norm=tower.use_qk_norm,
        biases=True,
    )


def megatron_config(
    shape: LayersShape, mesh: Mesh, memory: ActivationConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Translate a stack's shape and the layout into Megatron's configuration; `check_layout` refused the rest."""
    return TransformerConfig(
        num_layers=shape.depth,
        hidden_size=shape.embed_dim,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.mlp_dim,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        sequence_parallel=parallel.sequence,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,  # weights come from convert.fill
        params_dtype=torch.float32,
        pipeline_dtype=torch.bfloat16 if parallel.pipeline_messages == "bf16" else torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.biases,
        add_bias_linear=shape.biases,
        normalization="LayerNorm" if shape.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=shape.eps,
        gated_linear_unit=shape.gated,
        activation_func=F.silu if shape.gated else F.gelu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=True,
        batch_p2p_sync=False,  # a wait for the device after every message, against a fault of old versions of torch
        # Megatron is told of full recompute alone, which `CogViTBlock` does.
        recompute_granularity="full" if memory.recompute == "full" else None,
        recompute_method="uniform" if memory.recompute == "full" else None,
        recompute_num_layers=memory.recompute_blocks if memory.recompute == "full" else None,
    )


def build_trunk(
    tower: TowerConfig, config: TransformerConfig, mesh: Mesh, memory: ActivationConfig, pieces: Pieces
) -> TransformerBlock:
    """Return this stage's share of the tower's layers, without a final norm."""
    parts = layer_parts(config, mesh, PackedSelfAttention, AttnMaskType.no_mask, tower.norm, tower.use_qk_norm)
    if has_norm_after(tower):
        parts = replace(parts, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
    layer = ModuleSpec(CogViTLayer, params={"tower": tower}, submodules=parts)
    return build_layers([layer] * (config.num_layers // mesh.pp_size), config, mesh, memory, pieces)


def layer_parts(
    config: TransformerConfig,
    mesh: Mesh,
    attention: type[PackedSelfAttention],
    mask: AttnMaskType,
    norm_kind: Literal["layernorm", "rmsnorm"],
    qk_norm: bool,
    mlp: type[PackedMLP] = PackedMLP,
) -> TransformerLayerSubmodules:
    """Return what a layer of any of our stacks is made of, all but its residual branches."""
    norm = ModuleSpec(TensorSyncedNorm, params={"kind": norm_kind, "sync": config.sequence_parallel})
    # Each tensor rank normalizes its own heads with the shared weight: QK-norm is synced under any tensor parallelism.
    head_norm = ModuleSpec(TensorSyncedNorm, params={"kind": norm_kind, "sync": mesh.tp_size > 1}) if qk_norm else None
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            attention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnLinear,
                core_attention=IdentityOp,
                linear_proj=RowLinear,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(mlp, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)),
    )


def build_layers(
    layers: list[ModuleSpec], config: TransformerConfig, mesh: Mesh, memory: ActivationConfig, pieces: Pieces
) -> TransformerBlock:
    """Return this stage's share of a stack of layers, without a final norm; all stages have as many."""
    block = CogViTBlock(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=IdentityOp),
        post_layer_norm=False,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
    )
    mark_shards(block)
    for module in block.modules():
        if isinstance(module, (PackedSelfAttention, PackedMLP)):
            module.recompute = memory.recompute == "selective"
        if isinstance(getattr(module, "pieces", None), Pieces):
            module.pieces = pieces
    return block
