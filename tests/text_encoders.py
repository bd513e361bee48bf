"""Tiny text encoders of transformers with random weights, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCAB = 384  # ByT5's
MAX_TOKENS = 40
SIGLIP_TOKENS = 24  # to which SigLIP's own pooling pads


def bert() -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**SHAPE, vocab_size=VOCAB, max_position_embeddings=MAX_TOKENS)
    return transformers.BertModel(config)


def siglip2() -> transformers.PreTrainedModel:
    """With a vision tower, as published."""
    specials = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text = SHAPE | specials | {"vocab_size": VOCAB, "projection_size": 28, "max_position_embeddings": SIGLIP_TOKENS}
    vision = SHAPE | {"patch_size": 4, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))


def t5() -> transformers.PreTrainedModel:
    """Encoder and decoder, of which the encoder is wanted."""
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
    return transformers.T5ForConditionalGeneration(config)


def write_encoder(directory: Path, build: Callable[[], transformers.PreTrainedModel]) -> Path:
    """Write one of the above with weights that depend on nothing, larger than its own start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = directory / build.__name__
    model.save_pretrained(path)
    return path
