"""What a tower costs in a step: parameters and FLOPs, for the planner.

Parameters and the FLOPs of blocks and Muon are exact (tests count them); images and captions count with their largest
size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cogvit.config import RunConfig
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.language import CausalLM
from cogvit.model.language_config import LanguageConfig
from cogvit.model.vit import CogViT
from cogvit.training.optim import role_of
from cogvit.training.orthogonal import NEWTON_SCHULZ_STEPS


@dataclass(frozen=True)
class Load:
    """One tower's share of a step, over all ranks."""

    parameters: int
    depth: int
    width: int
    tokens: int
    pack_tokens: int
    forward_flops: float
    muon_flops: float  # of making every matrix of the blocks orthogonal once; 0 where Muon does not train them
    whole: bool = False  # no stage and no tensor rank shares it: every rank of the last stage has it


def count_parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(tower: CogViTConfig | TextConfig, tokens: int, sequence_tokens: int) -> float:
    """Return the FLOPs of the blocks' matrix products and attention for tokens in sequences of one length."""
    width, swiglu = tower.embed_dim, getattr(tower, "mlp", "gelu") == "swiglu"
    matrices = 4 * width**2 + (3 if swiglu else 2) * width * tower.mlp_dim
    return tower.depth * tokens * (2.0 * matrices + 4.0 * sequence_tokens * width)


def muon_flops(module: nn.Module, num_heads: int, qkv: str) -> float:
    """Return the FLOPs of one update of Muon's matrices; qkv is optim.muon_qkv."""
    flops = 0.0
    for name, parameter in module.named_parameters():
        if role_of(name, parameter) == "block_matrix":
            parts = {"split": 3, "heads": 3 * num_heads, "fused": 1}[qkv] if "qkv" in name else 1
            small, large = sorted((parameter.shape[0] // parts, parameter.shape[1]))
            flops += parts * NEWTON_SCHULZ_STEPS * (4.0 * small**2 * large + 2.0 * small**3)
    return flops


def vision_load(config: RunConfig) -> Load:
    """Return the vision tower's load."""
    data, shape = config.data, config.vision
    rows, columns = shape.base_grid
    patches = rows * columns if data.sizing == "square" else data.max_patches
    with torch.device("meta"):
        module = CogViT(shape)
    return tower_load(config, shape, module, patches + shape.use_cls_token, pack_tokens=data.tokens_per_pack)


def language_load(config: RunConfig, shape: LanguageConfig) -> Load:
    """Return the language model's load, in samples of the greatest length."""
    data, optim = config.data, config.optim
    with torch.device("meta"):
        module = CausalLM(shape)
    length = config.language.max_tokens
    tokens = length * max([data.global_batch_images, *(size for _, size in data.batch_schedule)])
    channels = shape.num_heads * shape.head_dim
    qkv = channels + 2 * shape.num_kv_heads * shape.head_dim
    matrices = shape.embed_dim * (qkv + channels + 3 * shape.mlp_dim)
    trains = optim.name == "muon" and optim.language.lr_mult > 0.0
    return Load(
        parameters=count_parameters(module),
        depth=shape.depth,
        width=shape.embed_dim,
        tokens=tokens,
        pack_tokens=data.text_tokens_per_pack,
        # Causal attention looks at half of the pairs.
        forward_flops=shape.depth * tokens * (2.0 * matrices + 2.0 * length * channels),
        muon_flops=muon_flops(module, shape.num_heads, optim.muon_qkv) if trains else 0.0,
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
    return Load(
        parameters=count_parameters(module),
        depth=tower.depth,
        width=tower.embed_dim,
        tokens=tokens,
        pack_tokens=pack_tokens,
        forward_flops=forward_flops(tower, tokens, length),
        muon_flops=muon_flops(module, tower.num_heads, optim.muon_qkv) if optim.name == "muon" else 0.0,
        whole=whole,
    )
