"""Tiny language models of transformers with random weights, one of each family and option that ours has.

And a tokenizer and a vision-language model of the same size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cogvit import AdapterConfig, CausalLM, CogViT, CogViTConfig, LanguageConfig, VisionLanguageModel
from cogvit.model.language_config import Family, mrope_section
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
    "glm": ("Glm", {"attention_bias": True}),
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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)  # more, and depth multiplies what was rounded
    return model.eval()


OTHER_MODELS: dict[str, dict[str, Any]] = {  # of families that ours does not build, and what differs from `_SHAPE`
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "bloom": {},  # its positions are those of the pack
    "bert": {"is_decoder": False},  # its tokens see what follows
}


def other_language(family: str, **options: Any) -> PreTrainedModel:
    """One of `OTHER_MODELS`, in fp32."""
    config = transformers.AutoConfig.for_model(family, **{**_SHAPE, **OTHER_MODELS[family], **options})
    config.eos_token_id = None
    with torch.random.fork_rng():
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model.eval()


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length]."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
IMAGE_ID = SPECIAL_TOKENS.index("<|image|>")
STRUCTURED = (  # a template that places images, as GLM-OCR's does
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (  # one that knows text alone, as SmolLM2's
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(template: str = STRUCTURED) -> PreTrainedTokenizerFast:
    """A tokenizer of special tokens and bytes."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    fast.chat_template = template
    return fast


def tiny_vlm(
    family: Family = "glm4", adapter: AdapterConfig | None = None, template: str = STRUCTURED, **options: Any
) -> VisionLanguageModel:
    """A vision-language model with scrambled weights: patches of 4 px, tokens of 8."""
    vision = CogViTConfig(16, 4, 3, 48, 2, 3, 2.0, eps=1e-5, norm="rmsnorm", mlp="swiglu", use_cls_token=False)
    vision.position = "rotary"
    glm = {"rotary_fraction": 0.5, "mrope_section": mrope_section(4)} if family == "glm4" else {}
    values = {"max_tokens": 512, "eps": 1e-5, **glm, **options}
    shape = LanguageConfig(family, 288, 64, 3, 4, 2, 16, 96, **values)
    model = VisionLanguageModel.joined(
        CogViT(vision), CausalLM(shape), tiny_tokenizer(template), adapter or AdapterConfig(), 16 * 16, 40 * 40
    )
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)  # more, and depth multiplies what was rounded
    return model.eval()


QUESTION = "What is it?"


def picture(height_px: int, width_px: int, seed: int = 0) -> Image.Image:
    """Noise that is smooth enough to survive resizing."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width_px, height_px), Image.Resampling.BILINEAR)


def conversation(*images: Image.Image) -> list[dict[str, Any]]:
    """One question behind the images."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
