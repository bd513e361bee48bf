"""What the released models of the CogVLM family have in common: shapes by config.json, and names of weights.

Our names are those of a `VisionLanguageModel`'s state: `language.*`, `vision.*`, `adapter.*`, `frame.*`, `cross.*`.

Source: config.json, modeling_cogvlm.py and visual.py of the released CogVLM-17B, CogVLM2-19B and CogAgent-18B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig, ExpertConfig
from cogvit.model.eva import EvaConfig
from cogvit.model.language_config import LanguageConfig
from cogvit.model.layouts.causal_lm import read_ids, special_ids
from cogvit.model.layouts.parts import Parts, Shapes
from cogvit.model.questions import Questions

Linear = dict[str, tuple[str, tuple[int, ...]]]  # our module -> theirs, and the shape of its weight
_LANGUAGE = {  # ours -> theirs, which a config.json must name
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
_VISION = {
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_heads",
    "mlp_dim": "intermediate_size",
}


@dataclass(frozen=True)
class CogShape:
    """Everything that decides which weights a model of the family has, and how it is asked.

    Attributes:
        language: the decoder, with experts in every block.
        vision: the encoder.
        adapter: what stands between them.
        cross: CogAgent's second encoder.
        image_token_id: what stands in token ids where an image is.
        questions: how conversations are read.
    """

    language: LanguageConfig
    vision: EvaConfig
    adapter: AdapterConfig
    image_token_id: int
    questions: Questions
    cross: EvaConfig | None = None


def read_language(values: Mapping[str, Any], **own: Any) -> LanguageConfig:
    """Return the decoder that a config.json describes; `own` is what a layout says itself.

    Errors: CheckpointError or ValueError when a size is missing or does not fit.
    """
    sizes = read_sizes(values, _LANGUAGE, "")
    if values.get("hidden_act", "silu") != "silu" or values.get("tie_word_embeddings"):
        raise CheckpointError("hidden_act must be 'silu' and tie_word_embeddings false, as released")
    return LanguageConfig(
        "llama",
        **{"num_kv_heads": sizes["num_heads"], "expert": ExpertConfig(1), **own, **sizes},
        head_dim=sizes["embed_dim"] // max(sizes["num_heads"], 1),
        eps=float(values.get("rms_norm_eps", 1e-5)),
        **read_ids(values),
    )


def read_vision(values: Mapping[str, Any], *, output_position: bool = False) -> EvaConfig:
    """Return the encoder that a config.json describes; CogAgent's adds learned positions to what comes out.

    Errors: CheckpointError or ValueError when a size is missing or does not fit.
    """
    said = values.get("vision_config")
    if not isinstance(said, dict):
        raise CheckpointError("it has no vision_config")
    sizes = read_sizes(said, _VISION, "vision_config.")
    positions = said.get("num_positions", (said.get("image_size", 0) // sizes["patch_size"]) ** 2 + 1)
    side = math.isqrt(positions - 1)
    image_size = said.get("image_size", side * sizes["patch_size"])
    activation = said.get("hidden_act", "gelu")
    if side**2 + 1 != positions or side != image_size // sizes["patch_size"] or activation != "gelu":
        raise CheckpointError(
            f"vision_config has image_size={image_size}, num_positions={positions} and hidden_act={activation!r};"
            " expected (image_size / patch_size) ** 2 + 1 positions and 'gelu'"
        )
    eps = float(said.get("layer_norm_eps", 1e-6))
    return EvaConfig("e", image_size, eps=eps, output_position=output_position, **sizes)


def config_values(shape: CogShape) -> dict[str, Any]:
    """Return what a config.json of every layout says of a shape."""
    language = shape.language
    return {
        **{theirs: getattr(language, ours) for ours, theirs in _LANGUAGE.items()},
        "hidden_act": "silu",
        "max_position_embeddings": language.max_tokens,
        "rms_norm_eps": language.eps,
        "template_version": shape.questions.template,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        **special_ids(language),
        "pad_token_id": shape.image_token_id,
        "vision_config": vision_values(shape.vision),
    }


def vision_values(vision: EvaConfig) -> dict[str, Any]:
    """Return the vision_config of a shape."""
    return {
        **{theirs: getattr(vision, ours) for ours, theirs in _VISION.items()},
        "image_size": vision.image_size,
        "num_positions": vision.side_patches**2 + 1,
        "in_channels": vision.in_chans,
        "hidden_act": "gelu",
        "layer_norm_eps": vision.eps,
        "dropout_prob": 0.0,
    }


def language_parts(cfg: LanguageConfig) -> Parts:
    """Return where the decoder's weights lie."""
    dim, mlp = cfg.embed_dim, cfg.mlp_dim
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    parts: Parts = {
        "language.embed.weight": {"model.embed_tokens.weight": (cfg.vocab_size, dim)},
        "language.norm.weight": {"model.norm.weight": (dim,)},
        "language.head.weight": {"lm_head.weight": (cfg.vocab_size, dim)},
    }
    for layer in range(cfg.depth):
        ours, theirs = f"language.blocks.{layer}.", f"model.layers.{layer}."
        parts[f"{ours}norm1.weight"] = {f"{theirs}input_layernorm.weight": (dim,)}
        parts[f"{ours}norm2.weight"] = {f"{theirs}post_attention_layernorm.weight": (dim,)}
        branches = (("attn.", "mlp.", "language"), ("expert.", "expert.mlp.", "vision"))
        for attention, feedforward, kind in branches[: 2 if cfg.has_expert(layer) else 1]:
            fused, own = f"{theirs}self_attn.{kind}_expert_query_key_value", f"{theirs}mlp.{kind}_mlp."
            parts[f"{ours}{attention}qkv.weight"] = {f"{fused}.weight": (q + 2 * kv, dim)}
            if kind == "vision" and cfg.expert.qkv_bias:
                parts[f"{ours}{attention}qkv.bias"] = {f"{fused}.bias": (q + 2 * kv,)}
            parts[f"{ours}{attention}proj.weight"] = {f"{theirs}self_attn.{kind}_expert_dense.weight": (dim, q)}
            gate_up: Shapes = {f"{own}{name}_proj.weight": (mlp, dim) for name in ("gate", "up")}
            parts[f"{ours}{feedforward}fc1.weight"] = gate_up
            parts[f"{ours}{feedforward}fc2.weight"] = {f"{own}down_proj.weight": (dim, mlp)}
    return parts


def rotation_names(cfg: LanguageConfig) -> Shapes:
    """Return the angles of the rotation, which every block stores."""
    names = (f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(cfg.depth))
    return dict.fromkeys(names, (cfg.head_dim // 2,))


def vision_parts(cfg: EvaConfig, llm_dim: int, root: str = "model.vision.") -> Parts:
    """Return where the weights of encoder and frame lie, behind the root."""
    dim, mlp = cfg.embed_dim, cfg.mlp_dim
    parts: Parts = {
        "frame.boi_embed": {f"{root}boi": (1, 1, llm_dim)},
        "frame.eoi_embed": {f"{root}eoi": (1, 1, llm_dim)},
        "vision.cls_token": {f"{root}patch_embedding.cls_embedding": (1, dim)},
        "vision.pos_embed": {f"{root}patch_embedding.position_embedding.weight": (cfg.side_patches**2 + 1, dim)},
    }
    if cfg.output_position:
        parts["vision.out_pos_embed"] = {f"{root}pos_embed": (cfg.side_patches**2, dim)}
    kernel = (dim, cfg.in_chans, cfg.patch_size, cfg.patch_size)
    linear: Linear = {"vision.patch_embed": ("patch_embedding.proj", kernel)}
    for layer in range(cfg.depth):
        ours, theirs = f"vision.blocks.{layer}.", f"transformer.layers.{layer}."
        linear |= {
            f"{ours}norm1": (f"{theirs}input_layernorm", (dim,)),
            f"{ours}norm2": (f"{theirs}post_attention_layernorm", (dim,)),
            f"{ours}attn.qkv": (f"{theirs}attention.query_key_value", (3 * dim, dim)),
            f"{ours}attn.proj": (f"{theirs}attention.dense", (dim, dim)),
            f"{ours}fc1": (f"{theirs}mlp.fc1", (mlp, dim)),
            f"{ours}fc2": (f"{theirs}mlp.fc2", (dim, mlp)),
        }
    return parts | with_biases(linear, root)


def adapter_parts(cfg: AdapterConfig, vision_dim: int, llm_dim: int, root: str = "model.vision.") -> Parts:
    """Return where the adapter's weights lie, behind the root."""
    own, hidden, pool = f"{root}linear_proj.", cfg.hidden_dim or 0, cfg.spatial_pool
    between = llm_dim if cfg.kind == "wide_conv" else vision_dim
    parts: Parts = {
        "adapter.proj.weight": {f"{own}linear_proj.weight": (llm_dim, between)},
        "adapter.norm.weight": {f"{own}norm1.weight": (llm_dim,)},
        "adapter.norm.bias": {f"{own}norm1.bias": (llm_dim,)},
        "adapter.fc1.weight": {f"{own}{name}.weight": (hidden, llm_dim) for name in ("gate_proj", "dense_h_to_4h")},
        "adapter.fc2.weight": {f"{own}dense_4h_to_h.weight": (llm_dim, hidden)},
    }
    if cfg.kind in ("conv", "wide_conv"):
        kernel = (between, vision_dim, pool, pool)
        parts |= with_biases({"adapter.downsample": ("conv", kernel)}, root)
    return parts


def with_biases(linear: Linear, root: str) -> Parts:
    """Return weights and biases of modules that have both, theirs behind the root."""
    parts: Parts = {}
    for ours, (theirs, size) in linear.items():
        parts[f"{ours}.weight"] = {f"{root}{theirs}.weight": size}
        parts[f"{ours}.bias"] = {f"{root}{theirs}.bias": size[:1]}
    return parts


def read_sizes(values: Mapping[str, Any], names: Mapping[str, str], prefix: str) -> dict[str, int]:
    """Return sizes by our names from a config.json's. Errors: CheckpointError names those that are none."""
    missing = [f"{prefix}{name}" for name in names.values() if not _is_size(values.get(name))]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} must be whole numbers of 1 or more")
    return {ours: values[theirs] for ours, theirs in names.items()}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
