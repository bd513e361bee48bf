"""CogAgent-18B: a CogVLM whose blocks look at EVA2-CLIP-L at 1120 px by cross attention.

config.json does not describe the second encoder: its shape is read off the tensors. Heads are 64 wide, and its last
block, its norm and its head are stored but not run.

Source: modeling_cogagent.py, visual.py and cross_visual.py of the released cogagent-chat-hf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig
from cogvit.model.eva import EvaConfig
from cogvit.model.language_config import CrossConfig
from cogvit.model.layouts import cogvlm
from cogvit.model.layouts.causal_lm import read_id
from cogvit.model.layouts.cog import CogShape, Linear, config_values, read_language, read_vision, with_biases
from cogvit.model.layouts.parts import Parts, Shapes
from cogvit.model.questions import Questions

_HEAD_DIM = 64
_CLASSES = 768  # of the head that is not run
_ROOT = "model.cross_vision.vit.model."
_ROPE = ("freqs_cos", "freqs_sin")


def read_shape(values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> CogShape:
    """Return the model that a config.json and the stored shapes describe. Errors: CheckpointError or ValueError."""
    cross = CrossConfig(values.get("cross_hidden_size", 1024), values.get("cross_compute_hidden_size", 1024))
    own = {"max_tokens": values.get("max_position_embeddings", 2048), "rope_base": 10000.0, "cross": cross}
    language = read_language(values, **own)
    adapter = AdapterConfig("swiglu", language.mlp_dim, 1)
    return CogShape(
        language,
        read_vision(values, output_position=True),
        adapter,
        read_id(values, "pad_token_id") or 0,
        Questions(values.get("template_version", "chat"), "cogagent"),
        _read_cross(values, stored, cross.encoder_dim),
    )


def write_shape(shape: CogShape) -> dict[str, Any]:
    """Return a config.json."""
    assert shape.cross is not None, "CogAgent has a second encoder"
    cross = shape.language.cross
    return {
        "architectures": ["CogAgentForCausalLM"],
        "cross_hidden_size": cross.encoder_dim,
        "cross_compute_hidden_size": cross.dim,
        "cross_image_size": shape.cross.image_size,
        **config_values(shape),
    }


def parts(shape: CogShape) -> Parts:
    """Return where the weights lie."""
    assert shape.cross is not None, "CogAgent has a second encoder"
    language, cfg = shape.language, shape.cross
    dim, cross, tokens = language.embed_dim, language.cross, cfg.side_patches**2
    found = cogvlm.parts(shape)
    for layer in range(language.depth):
        ours, theirs = f"language.blocks.{layer}.cross.", f"model.layers.{layer}."
        found[f"{ours}norm.weight"] = {f"{theirs}post_cross_attention_layernorm.weight": (dim,)}
        found[f"{ours}query.weight"] = {f"{theirs}cross_attn.query.weight": (cross.dim, dim)}
        found[f"{ours}key_value.weight"] = {f"{theirs}cross_attn.key_value.weight": (2 * cross.dim, cross.encoder_dim)}
        found[f"{ours}proj.weight"] = {f"{theirs}cross_attn.dense.weight": (dim, cross.dim)}
    found |= {
        "cross.cls_token": {f"{_ROOT}cls_token": (1, 1, cfg.embed_dim)},
        "cross.pos_embed": {f"{_ROOT}pos_embed": (1, tokens + 1, cfg.embed_dim)},
        "cross.out_pos_embed": {"model.cross_vision.pos_embed": (tokens, cfg.embed_dim)},
        **{f"cross.{x}_TK": {f"{_ROOT}rope.freqs_{x}": (tokens, cfg.head_dim)} for x in ("cos", "sin")},
    }
    kernel = (cfg.embed_dim, cfg.in_chans, cfg.patch_size, cfg.patch_size)
    found |= with_biases({"cross.patch_embed": ("patch_embed.proj", kernel)}, _ROOT)
    for layer in range(cfg.depth):
        found |= _block(cfg, layer)
    return found


def carried(shape: CogShape, stored: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return what is stored besides the weights that are run: angles, and the second encoder's end.

    stored: shapes of a checkpoint, whose head may have other classes than the released one.
    """
    assert shape.cross is not None, "CogAgent has a second encoder"
    dim = shape.cross.embed_dim
    last = [theirs for theirs in _block(shape.cross, shape.cross.depth).values()]
    classes = next(iter(stored.get(f"{_ROOT}head.weight", ())), _CLASSES)
    end = with_biases({"norm": ("norm", (dim,)), "head": ("head", (classes, dim))}, _ROOT)
    flat = {name: size for theirs in (*last, *end.values()) for name, size in theirs.items()}
    return cogvlm.carried(shape) | flat


def optional(shape: CogShape) -> Shapes:
    """Return copies of the second encoder's angles, which each of its blocks may store too."""
    assert shape.cross is not None, "CogAgent has a second encoder"
    size = (shape.cross.side_patches**2, shape.cross.head_dim)
    blocks = range(shape.cross.depth + 1)
    return {f"{_ROOT}blocks.{layer}.attn.rope.{name}": size for layer in blocks for name in _ROPE}


def _block(cfg: EvaConfig, layer: int) -> Parts:
    ours, root = f"cross.blocks.{layer}.", f"{_ROOT}blocks.{layer}."
    dim, mlp = cfg.embed_dim, cfg.mlp_dim
    linear: Linear = {
        f"{ours}norm1": ("norm1", (dim,)),
        f"{ours}norm2": ("norm2", (dim,)),
        f"{ours}attn.norm": ("attn.inner_attn_ln", (dim,)),
        f"{ours}attn.proj": ("attn.proj", (dim, dim)),
        f"{ours}mlp_norm": ("mlp.ffn_ln", (mlp,)),
        f"{ours}fc2": ("mlp.w3", (dim, mlp)),
    }
    return {
        **with_biases(linear, root),
        f"{ours}attn.qkv.weight": {f"{root}attn.{x}_proj.weight": (dim, dim) for x in "qkv"},
        f"{ours}attn.q_bias": {f"{root}attn.q_bias": (dim,)},
        f"{ours}attn.v_bias": {f"{root}attn.v_bias": (dim,)},
        f"{ours}fc1.weight": {f"{root}mlp.{x}.weight": (mlp, dim) for x in ("w1", "w2")},
        f"{ours}fc1.bias": {f"{root}mlp.{x}.bias": (mlp,) for x in ("w1", "w2")},
    }


def _read_cross(values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]], encoder_dim: int) -> EvaConfig:
    kernel: tuple[int, ...] = stored.get(f"{_ROOT}patch_embed.proj.weight", ())
    gate = stored.get(f"{_ROOT}blocks.0.mlp.w1.weight", ())
    found = (re.match(re.escape(f"{_ROOT}blocks.") + r"(\d+)\.", name) for name in stored)
    blocks = 1 + max((int(match[1]) for match in found if match), default=-1)
    if len(kernel) != 4 or len(gate) != 2 or blocks < 2 or kernel[0] != encoder_dim:
        raise CheckpointError(
            f"{_ROOT}* is no encoder of {encoder_dim} channels and two blocks or more: patch_embed.proj.weight has"
            f" shape {kernel}, blocks.0.mlp.w1.weight {gate}, and there are {blocks} blocks"
        )
    side = math.isqrt(next(iter(stored.get("model.cross_vision.pos_embed", ())), 0))
    image_size = values.get("cross_image_size", side * kernel[-1])
    heads = encoder_dim // _HEAD_DIM
    return EvaConfig("l", image_size, kernel[-1], encoder_dim, blocks - 1, heads, gate[0], output_position=True)
