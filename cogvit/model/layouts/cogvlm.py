"""CogVLM-17B: Vicuna with visual experts, EVA2-CLIP-E at 224 or 490 px, every patch a token.

Source: config.json and modeling_cogvlm.py of the released cogvlm-chat-hf and cogvlm-grounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvit.model.config import AdapterConfig
from cogvit.model.layouts.causal_lm import read_id
from cogvit.model.layouts.cog import (
    CogShape,
    adapter_parts,
    config_values,
    language_parts,
    read_language,
    read_vision,
    rotation_names,
    vision_parts,
)
from cogvit.model.layouts.parts import Parts, Shapes
from cogvit.model.questions import Questions


def read_shape(values: Mapping[str, Any]) -> CogShape:
    """Return the model that a config.json describes. Errors: CheckpointError or ValueError."""
    language = read_language(values, max_tokens=values.get("max_position_embeddings", 2048), rope_base=10000.0)
    questions = Questions(values.get("template_version", "chat"))
    adapter = AdapterConfig("swiglu", language.mlp_dim, 1)
    return CogShape(language, read_vision(values), adapter, read_id(values, "pad_token_id") or 0, questions)


def write_shape(shape: CogShape) -> dict[str, Any]:
    """Return a config.json."""
    return {"architectures": ["CogVLMForCausalLM"], **config_values(shape)}


def parts(shape: CogShape) -> Parts:
    """Return where the weights lie."""
    language, vision = shape.language, shape.vision
    joint = vision_parts(vision, language.embed_dim)
    return language_parts(language) | joint | adapter_parts(shape.adapter, vision.embed_dim, language.embed_dim)


def carried(shape: CogShape) -> Shapes:
    """Return what is stored besides weights: angles."""
    return rotation_names(shape.language)
