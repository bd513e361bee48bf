"""What a tower costs in a step: parameters and FLOPs, for the planner.

Parameters and the FLOPs of blocks and Muon are exact (tests count them); images and captions count with their largest
size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cogvit.config import ActivationConfig, RunConfig
from cogvit.model.adapter import fitted_adapter
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.eva import EvaEncoder, second_encoder
from cogvit.model.expert import is_grown
from cogvit.model.language import CausalLM
from cogvit.model.language_config import LanguageConfig, LanguageShape
from cogvit.model.pretrained import new_causal_lm
from cogvit.model.vit import CogViT
from cogvit.training.optim import role_of
from cogvit.training.orthogonal import NEWTON_SCHULZ_STEPS


@dataclass(frozen=True)
class Load:
    """One tower's share of a step, over all ranks."""

    parameters: int
    matrices: tuple[tuple[int, int], ...]  # of the blocks, which Muon makes orthogonal; none of a tower that is whole
    depth: int
    width: int
    hidden: int  # F, the MLP's width, of which fc1 gives one or, gated, two
    gated: bool
    tokens: int
    pack_tokens: int
    product_flops: float  # of a forward
    attention_flops: float  # of a forward
    muon_flops: float  # of making every matrix of the blocks orthogonal once; 0 where Muon does not train them
    memory: ActivationConfig
    whole: bool = False  # no stage and no tensor rank shares it: every rank of the last stage has it
    frozen: int = 0  # of the parameters, those that have neither gradients nor moments
    # When a forward without gradients comes before all others, for embeddings that the rest of the step reads.
    runs_first: Literal["never", "in_pipelines", "unless_at_once"] = "never"

    def runs_twice(self, pp: int, micro: int) -> bool:
        """Whether a step of so many microbatches runs it once more, before all others, without gradients."""
        return (pp > 1 and self.runs_first != "never") or (micro > 1 and self.runs_first == "unless_at_once")

    @property
    def learned(self) -> int:
        """Parameters with gradients and moments."""
        return self.parameters - self.frozen

    @property
    def forward_flops(self) -> float:
        """Of matrix products and attention."""
        return self.product_flops + self.attention_flops


def kept_bytes(load: Load, tp: int, *, sequence: bool, fused: bool, precision: str) -> float:
    """Return what a block keeps for backward of one pack on one rank; within 10 % of what autograd keeps (tests).

    Unless pieces are fused, torch without CUDA keeps fp32 quotients of RMS norms beside (as much as an activation of
    the MLP in bf16): it takes the norm apart, which is one kernel in torch with CUDA.
    """
    half, tokens, width = (2 if precision == "bf16" else 4), load.pack_tokens, load.width
    outside = tp if sequence else 1
    if load.memory.recompute == "full":
        return 4.0 * tokens * width / load.memory.recompute_blocks / outside
    stream = 2 * (4 + half) * width / outside  # the residual stream and the norm of it, before attention and MLP
    attention = 4 * half * width / tp  # q, k, v and what attention gives
    mlp, cast = 0.0, 4.0 * width**2  # with `selective`, attention's products alone have run
    if load.memory.recompute == "none":
        attention += 3 * half * width / tp  # q and k, rotated, and what attention gives once more, with padding
        hidden = half * load.hidden / tp
        fc1 = (2 if load.gated else 1) * hidden
        mlp = fc1 + hidden + (hidden if load.gated and not fused else 0.0)  # what fc2 takes, and SiLU of the gate
        cast = sum(rows * columns for rows, columns in load.matrices) / load.depth
    casts = half * cast / tp if half == 2 else 0.0
    return tokens * (stream + attention + mlp) + casts


def count_parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def product_flops(tower: CogViTConfig | TextConfig, tokens: int) -> float:
    """Return the FLOPs of the blocks' matrix products in a forward."""
    gated = getattr(tower, "mlp", "gelu") == "swiglu"
    matrices = 4 * tower.embed_dim**2 + (3 if gated else 2) * tower.embed_dim * tower.mlp_dim
    return tower.depth * tokens * 2.0 * matrices


def attention_flops(tower: CogViTConfig | TextConfig, tokens: int, sequence_tokens: int) -> float:
    """Return the FLOPs of attention in a forward of sequences of one length."""
    return tower.depth * tokens * 4.0 * sequence_tokens * tower.embed_dim


def muon_flops(named: Iterable[tuple[str, nn.Parameter]], num_heads: int, qkv: str) -> float:
    """Return the FLOPs of one update of Muon's matrices; qkv is optim.muon_qkv."""
    flops = 0.0
    for name, parameter in named:
        if role_of(name, parameter) == "block_matrix":
            parts = {"split": 3, "heads": 3 * num_heads, "fused": 1}[qkv] if "qkv" in name else 1
            small, large = sorted((parameter.shape[0] // parts, parameter.shape[1]))
            flops += parts * NEWTON_SCHULZ_STEPS * (4.0 * small**2 * large + 2.0 * small**3)
    return flops


def vision_load(config: RunConfig) -> Load:
    """Return the vision tower's load."""
    shape, length = config.vision, _largest_patches(config) + config.vision.use_cls_token
    with torch.device("meta"):
        module = CogViT(shape)
    load = tower_load(config, shape, module, length, pack_tokens=config.data.tokens_per_pack)
    learns = config.objective != "language" or config.optim.vision.lr_mult > 0.0
    return load if learns else replace(load, frozen=load.parameters, muon_flops=0.0)


def _largest_patches(config: RunConfig) -> int:
    rows, columns = config.vision.base_grid
    return rows * columns if config.data.sizing == "square" else config.data.max_patches


def language_load(config: RunConfig, shape: LanguageShape) -> Load:
    """Return the language model's load, in samples of the greatest length; each token goes through one expert or none.

    One of transformers has the FLOPs of a Llama of its sizes. Source: `cogvit.model.expert`.
    """
    data, optim = config.data, config.optim
    ours = isinstance(shape, LanguageConfig)
    with torch.device("meta"):
        module = CausalLM(shape) if isinstance(shape, LanguageConfig) else new_causal_lm(Path(config.language.path))
    length = config.language.max_tokens
    tokens = length * max([data.global_batch_images, *(size for _, size in data.batch_schedule)])
    channels = shape.num_heads * shape.head_dim
    qkv = channels + 2 * shape.num_kv_heads * shape.head_dim
    matrices = shape.embed_dim * (qkv + channels + 3 * shape.mlp_dim)
    cross, rows = shape.cross, config.cross.rows_per_image  # of the one image that a sample has
    looking = 2.0 * tokens * 2 * shape.embed_dim * cross.dim
    looking += 2.0 * (tokens // length) * rows * cross.encoder_dim * 2 * cross.dim
    learned = [(name, p) for name, p in module.named_parameters() if optim.language.lr_mult > 0.0 or is_grown(name)]
    trains = optim.name == "muon"
    blocks = [p for name, p in learned if role_of(name, p) == "block_matrix"]
    return Load(
        parameters=count_parameters(module),
        matrices=tuple((p.shape[0], p.shape[1]) for p in blocks) if trains and ours else (),
        depth=shape.depth,
        width=shape.embed_dim,
        hidden=shape.mlp_dim,
        gated=True,
        tokens=tokens,
        pack_tokens=data.text_tokens_per_pack,
        product_flops=shape.depth * (tokens * 2.0 * matrices + looking),
        # It is causal: half of the pairs; cross attention sees all.
        attention_flops=shape.depth * tokens * (2.0 * length * channels + 4.0 * rows * cross.dim),
        muon_flops=muon_flops(learned, shape.num_heads, optim.muon_qkv) if trains else 0.0,
        memory=config.memory.language,
        whole=not ours,
        frozen=count_parameters(module) - sum(p.numel() for _, p in learned),
    )


def adapter_load(config: RunConfig, shape: LanguageShape) -> Load:
    """Return the adapter's load, which lies whole on every tensor rank: one block with the language model's width."""
    data, pooled = config.data, config.adapter.spatial_pool**2
    with torch.device("meta"):
        adapter = fitted_adapter(config.adapter, config.vision.embed_dim, shape)
    parameters = count_parameters(adapter)
    images = max([data.global_batch_images, *(size for _, size in data.batch_schedule)])
    tokens = images * -(-_largest_patches(config) // pooled)
    learns = config.optim.adapter.lr_mult > 0.0
    return Load(
        parameters=parameters,
        matrices=(),
        depth=1,
        width=shape.embed_dim,
        hidden=shape.embed_dim,
        gated=False,
        tokens=tokens,
        pack_tokens=-(-data.tokens_per_pack // pooled),
        product_flops=2.0 * tokens * sum(p.numel() for p in adapter.parameters() if p.ndim > 1),
        attention_flops=0.0,
        muon_flops=0.0,
        memory=ActivationConfig(),
        whole=True,
        frozen=0 if learns else parameters,
    )


def cross_load(config: RunConfig) -> Load:
    """Return the load of a second encoder, which lies whole on every tensor rank, for one image a sample."""
    data, module = config.data, config.cross
    with torch.device("meta"):
        encoder = EvaEncoder(second_encoder(module))
    images = max([data.global_batch_images, *(size for _, size in data.batch_schedule)])
    tokens, length = images * module.rows_per_image, module.rows_per_image
    in_pack = min(data.images_per_pack, max(1, data.tokens_per_pack // _largest_patches(config)))
    named = list(encoder.named_parameters())
    matrices = 4 * module.embed_dim**2 + 3 * module.embed_dim * module.mlp_dim
    again = config.memory.vision.recompute != "none"
    return Load(
        parameters=count_parameters(encoder),
        matrices=(),
        depth=module.depth,
        width=module.embed_dim,
        hidden=module.mlp_dim,
        gated=True,
        tokens=tokens,
        pack_tokens=in_pack * length,
        product_flops=module.depth * tokens * 2.0 * matrices,
        attention_flops=module.depth * tokens * 4.0 * length * module.embed_dim,
        muon_flops=muon_flops(named, module.num_heads, config.optim.muon_qkv) if config.optim.name == "muon" else 0.0,
        memory=ActivationConfig("full" if again else "none"),
        whole=True,
    )


def tower_load(
    config: RunConfig,
    tower: CogViTConfig | TextConfig,
    module: nn.Module,
    length: int,
    *,
    pack_tokens: int,
    whole: bool = False,
) -> Load:
    """Return a tower's load in sequences of one length, one for each image of the largest global batch."""
    data, optim = config.data, config.optim
    tokens = length * max([data.global_batch_images, *(size for _, size in data.batch_schedule)])
    named = list(module.named_parameters())
    matrices = [p for name, p in named if role_of(name, p) == "block_matrix"]
    return Load(
        parameters=count_parameters(module),
        matrices=() if whole else tuple((p.shape[0], p.shape[1]) for p in matrices),
        depth=tower.depth,
        width=tower.embed_dim,
        hidden=tower.mlp_dim,
        gated=getattr(tower, "mlp", "gelu") == "swiglu",
        tokens=tokens,
        pack_tokens=pack_tokens,
        product_flops=product_flops(tower, tokens),
        attention_flops=attention_flops(tower, tokens, length),
        muon_flops=muon_flops(named, tower.num_heads, optim.muon_qkv) if optim.name == "muon" else 0.0,
        memory=config.memory.text if isinstance(tower, TextConfig) or whole else config.memory.vision,
        whole=whole,
    )
