"""Tiny language models of transformers with random weights, one of each family and option that ours has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.plain_vit import scramble

VOCABULARY = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied_llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3, "rope_theta": 500000.0}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "glm4": ("Glm4", {"attention_bias": False}),
    "glm4_biases": ("Glm4", {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 24}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_tied_biases": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def tiny_language(name: str, **options: Any) -> PreTrainedModel:
    """One of `LANGUAGE_MODELS`, in fp32."""
    family, own = LANGUAGE_MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **own, **options})
    if options.get("eos_token_id", own.get("eos_token_id")) is None:
        config.eos_token_id = None  # Glm4Config has its own by default
    with torch.random.fork_rng():
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    scramble(model)
    return model.eval()


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length]."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
