"""CogVLM2-19B, image and video: Llama 3 with visual experts, EVA2-CLIP-E at up to 1344 px, 2 x 2 patches a token.

Source: config.json, modeling_cogvlm.py and visual.py of the released cogvlm2-llama3-chat-19B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvit.errors import CheckpointError
from cogvit.model.config import AdapterConfig, ExpertConfig
from cogvit.model.layouts import cogvlm
from cogvit.model.layouts.causal_lm import read_id
from cogvit.model.layouts.cog import CogShape, config_values, read_language, read_vision
from cogvit.model.layouts.parts import Parts, Shapes
from cogvit.model.questions import Questions

_PAD_ID = 128002  # of Llama 3's reserved tokens; stands in the released code


def read_shape(values: Mapping[str, Any]) -> CogShape:
    """Return the model that a config.json describes. Errors: CheckpointError or ValueError."""
    kv_heads = values.get("num_multi_query_heads", 8)
    if not isinstance(kv_heads, int) or kv_heads < 1:
        raise CheckpointError(f"num_multi_query_heads={kv_heads!r} must be a whole number of 1 or more")
    own = {"num_kv_heads": kv_heads, "rope_base": 500000.0, "expert": ExpertConfig(1, qkv_bias=True)}
    language = read_language(values, max_tokens=values.get("max_position_embeddings", 8192), **own)
    token_id = read_id(values, "pad_token_id")
    token_id = min(_PAD_ID, language.vocab_size - 1) if token_id is None else token_id
    questions = Questions(values.get("template_version", "chat"))
    return CogShape(language, read_vision(values), AdapterConfig("conv", language.mlp_dim, 2), token_id, questions)


def write_shape(shape: CogShape) -> dict[str, Any]:
    """Return a config.json."""
    own = {"architectures": ["CogVLMForCausalLM"], "num_multi_query_heads": shape.language.num_kv_heads}
    return {**own, **config_values(shape)}


def parts(shape: CogShape) -> Parts:
    """Return where the weights lie: as CogVLM's, with the adapter's convolution."""
    return cogvlm.parts(shape)


def carried(shape: CogShape) -> Shapes:
    """Return what is stored besides weights: angles."""
    return cogvlm.carried(shape)
