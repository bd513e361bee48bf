"""GLM-4V-9B: GLM-4-9B without visual experts, EVA2-CLIP-E at 1120 px, 2 x 2 patches a token by a widening convolution.

What stands for an image is divided by a factor behind the adapter; here it is in the weights. It is a power of 2, which
changes no digit of a float, so that files come out as they went in.

Source: config.json, configuration_chatglm.py, modeling_chatglm.py and visual.py of the released glm-4v-9b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig
from cogvit.model.language_config import LanguageConfig
from cogvit.model.layouts.causal_lm import read_id, read_ids, special_ids
from cogvit.model.layouts.cog import CogShape, adapter_parts, read_sizes, read_vision, vision_parts, vision_values
from cogvit.model.layouts.parts import Parts, Shapes
from cogvit.model.questions import Questions

ROPE_BASE = 10000.0
SCALED = ("adapter.fc2.weight", "frame.boi_embed", "frame.eoi_embed")  # of which nothing else comes behind
_SCALE = 8.0  # as released
_ROOT = "transformer."
_SIZES = {
    "vocab_size": "padded_vocab_size",
    "embed_dim": "hidden_size",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "mlp_dim": "ffn_hidden_size",
    "max_tokens": "seq_length",
}
_EXPECTED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "original_rope": True,
    "pre_seq_len": None,
}


def read_shape(values: Mapping[str, Any]) -> CogShape:
    """Return the model that a config.json describes. Errors: CheckpointError or ValueError."""
    wrong = [f"{name}={values.get(name)!r}" for name, expected in _EXPECTED.items() if values.get(name) != expected]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}; expected as released: {_EXPECTED}")
    scale_of(values)
    sizes: dict[str, Any] = read_sizes(values, _SIZES, "")
    language = LanguageConfig(
        "glm",
        **sizes,
        eps=float(values.get("layernorm_epsilon", 1.5625e-07)),
        rope_base=ROPE_BASE * float(values.get("rope_ratio", 1)),
        rotary_fraction=0.5,
        qkv_bias=True,
        **read_ids(values),
    )
    token_id = read_id(values, "boi_token_id")
    return CogShape(
        language,
        read_vision(values),
        AdapterConfig("wide_conv", language.mlp_dim, 2),
        language.vocab_size - 1 if token_id is None else token_id,
        Questions("chat", "glm4v"),
    )


def scale_of(values: Mapping[str, Any]) -> float:
    """Return by what images are divided. Errors: CheckpointError when it is no power of 2."""
    vision = values.get("vision_config")
    scale = vision.get("scaling_factor", _SCALE) if isinstance(vision, dict) else _SCALE
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise CheckpointError(f"vision_config.scaling_factor={scale!r} must be a power of 2, as released (8)")
    return float(scale)


def write_shape(shape: CogShape) -> dict[str, Any]:
    """Return a config.json."""
    language = shape.language
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        **{theirs: getattr(language, ours) for ours, theirs in _SIZES.items()},
        **_EXPECTED,
        "layernorm_epsilon": language.eps,
        "rope_ratio": language.rope_base / ROPE_BASE,
        "boi_token_id": shape.image_token_id,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        **special_ids(language),
        "vision_config": {**vision_values(shape.vision), "scaling_factor": _SCALE},
    }


def parts(shape: CogShape) -> Parts:
    """Return where the weights lie."""
    language, vision = shape.language, shape.vision
    dim, mlp = language.embed_dim, language.mlp_dim
    queries = language.num_heads * language.head_dim
    rows = queries + 2 * language.num_kv_heads * language.head_dim
    found: Parts = {
        "language.embed.weight": {f"{_ROOT}embedding.word_embeddings.weight": (language.vocab_size, dim)},
        "language.norm.weight": {f"{_ROOT}encoder.final_layernorm.weight": (dim,)},
        "language.head.weight": {f"{_ROOT}output_layer.weight": (language.vocab_size, dim)},
    }
    own: Shapes = {
        "norm1.weight": (dim,),
        "attn.qkv.weight": (rows, dim),
        "attn.qkv.bias": (rows,),
        "attn.proj.weight": (dim, queries),
        "norm2.weight": (dim,),
        "mlp.fc1.weight": (2 * mlp, dim),
        "mlp.fc2.weight": (dim, mlp),
    }
    names = {
        "norm1.": "input_layernorm.",
        "norm2.": "post_attention_layernorm.",
        "attn.qkv.": "self_attention.query_key_value.",
        "attn.proj.": "self_attention.dense.",
        "mlp.fc1.": "mlp.dense_h_to_4h.",
        "mlp.fc2.": "mlp.dense_4h_to_h.",
    }
    for layer in range(language.depth):
        for ours, size in own.items():
            part, _, kind = ours.rpartition(".")
            theirs = f"{_ROOT}encoder.layers.{layer}.{names[f'{part}.']}{kind}"
            found[f"language.blocks.{layer}.{ours}"] = {theirs: size}
    root = f"{_ROOT}vision."
    found |= vision_parts(vision, dim, root)
    return found | adapter_parts(shape.adapter, vision.embed_dim, dim, root)


def carried(shape: CogShape) -> Shapes:
    """Return what is stored but never read: the released code computes its angles anew."""
    return {f"{_ROOT}rotary_pos_emb.inv_freq": (shape.language.rotary_dim // 2,)}
