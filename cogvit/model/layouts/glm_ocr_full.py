"""A whole GLM-OCR as transformers stores it: encoder, merger and language model in one directory, with its processor.

The encoder and the merger are read and written by `cogvit.model.glm_ocr`; here are the language model, which is a
GLM-4 without biases whose image tokens have positions by row and column, and the processor's files.

Source: transformers 5.23, models/glm_ocr and models/glm46v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model import glm_ocr
from cogvit.model.config import CogViTConfig
from cogvit.model.image_input import ImageLimits
from cogvit.model.interop import read_processor
from cogvit.model.language_config import LanguageConfig
from cogvit.model.layouts.causal_lm import (
    causal_lm_parts,
    config_values,
    from_causal_lm,
    language_config,
    read_generation,
    with_heads,
    write_generation,
)
from cogvit.model.layouts.files import CONFIG, read_json, read_weights, write_files, write_json
from cogvit.model.layouts.parts import split

MODEL_TYPE = glm_ocr.MODEL_TYPE
_LANGUAGE, _HEAD = "model.language_model.", "lm_head."
_TOKENS = {  # of the configuration there -> in the tokenizer
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_ROPE = {"partial_rotary_factor": 1.0, "mrope_section": [8, 12, 12]}
_SIZE = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}  # px of all frames of a patch together
_BICUBIC = 3
Model = tuple[LanguageConfig, Mapping[str, Tensor]]
Vision = tuple[CogViTConfig, Mapping[str, Tensor]]


def read(directory: Path) -> tuple[LanguageConfig, dict[str, Tensor], int, ImageLimits]:
    """Return the language model's shape and weights, the image token's id and the size of images.

    Heads for more tokens are layers behind the last one.

    Errors: CheckpointError when a file is missing or damaged, or names every missing, extra and misshaped weight.
    """
    values = read_json(directory / CONFIG)
    text = values.get("text_config")
    if not isinstance(text, dict) or not isinstance(values.get("image_token_id", 59280), int):
        raise CheckpointError(f"{directory / CONFIG} has no text_config with an image_token_id beside it")
    said = {**_DEFAULTS, **text, "model_type": "glm4", "attention_bias": False}
    said |= {"head_dim": text.get("head_dim") or text.get("hidden_size", 0) // text.get("num_attention_heads", 1)}
    said |= {"rope_parameters": {**_ROPE, **(text.get("rope_parameters") or {})}, **read_generation(directory)}
    said["tie_word_embeddings"] = values.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    try:
        cfg = language_config(said)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: text_config: {error}") from None
    weights = read_weights(directory, _LANGUAGE)
    cfg = with_heads(directory, cfg, text, weights, "")
    weights |= {f"{_HEAD}{name}": weight for name, weight in read_weights(directory, _HEAD).items()}
    plain = from_causal_lm(directory, weights, cfg, prefix="")
    return cfg, plain, values.get("image_token_id", 59280), _read_limits(directory, values.get("vision_config", {}))


def write(
    directory: Path, vision: Vision, adapter: Mapping[str, Tensor], language: Model, limits: ImageLimits, tokenizer: Any
) -> None:
    """Write model, processor and tokenizer; the directory is made.

    Args:
        directory: where to.
        vision: shape and weights of a `CogViT`.
        adapter: weights of a `GlmAdapter`.
        language: shape and weights of a `CausalLM`.
        limits: of images.
        tokenizer: of transformers.

    Errors: CheckpointError names what GLM-OCR cannot hold.
    """
    (vision_cfg, vision_weights), (cfg, weights) = vision, language
    tokens = _checked_tokens(cfg, tokenizer)
    pool = limits.unit_px // vision_cfg.patch_size
    shape = replace(glm_ocr.shape_of(vision_cfg), out_hidden_size=cfg.embed_dim, spatial_merge_size=pool)
    tower = {**glm_ocr.tower_to_glm_ocr(vision_weights, shape), **glm_ocr.adapter_to_glm_ocr(adapter, shape)}
    rope = {**config_values(cfg)["rope_parameters"], "mrope_section": list(cfg.mrope_section or ())}
    text = {"model_type": "glm_ocr_text", **config_values(cfg), "rope_parameters": rope, "dtype": "float32"}
    text = {name: value for name, value in text.items() if name not in ("attention_bias", "tie_word_embeddings")}
    values = {
        "model_type": MODEL_TYPE,
        "architectures": ["GlmOcrForConditionalGeneration"],
        "dtype": "float32",
        "text_config": text,
        "vision_config": glm_ocr.write_shape(shape),
        "tie_word_embeddings": cfg.tied,
        **tokens,
    }
    named = {f"model.visual.{name}": weight for name, weight in tower.items()}
    write_files(directory, values, {**named, **split(weights, causal_lm_parts(cfg, _LANGUAGE))})
    write_generation(directory, cfg)
    _write_processor(directory, shape, limits)
    tokenizer.save_pretrained(directory)


def _checked_tokens(cfg: LanguageConfig, tokenizer: Any) -> dict[str, int]:
    """The ids of the image tokens. Errors: CheckpointError names what GLM-OCR cannot hold."""
    problems = []
    if cfg.family != "glm4" or cfg.qkv_bias or cfg.mrope_section is None:
        problems.append(
            f"a language model of family {cfg.family} with qkv_bias={cfg.qkv_bias} and"
            f" mrope_section={cfg.mrope_section} (expected glm4 without biases, with sections)"
        )
    if cfg.mmtp.num_layers > 1 or (cfg.mmtp.depths and cfg.mmtp.images == "tokens"):
        problems.append(
            f"{cfg.mmtp.num_layers} heads with mmtp.images={cfg.mmtp.images} (expected one shared layer without tokens"
            " of its own)"
        )
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    lacking = [token for token in _TOKENS.values() if token not in vocabulary]
    if lacking:
        problems.append(f"a tokenizer without {' '.join(lacking)}")
    elif _TOKENS["image_token_id"] not in (tokenizer.chat_template or ""):
        problems.append("a chat template that does not place <|image|>")
    if problems:
        raise CheckpointError(f"the layout of GLM-OCR cannot hold {'; nor '.join(problems)}")
    return {name: int(vocabulary[token]) for name, token in _TOKENS.items()}


def _write_processor(directory: Path, shape: glm_ocr.GlmOcrShape, limits: ImageLimits) -> None:
    edges = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    size = {name: round(pixels * shape.temporal_patch_size) for name, pixels in edges.items()}
    processor = {**glm_ocr.write_processor(shape), "size": size, "resample": _BICUBIC}
    write_json(directory / "preprocessor_config.json", {**processor, "processor_class": "Glm46VProcessor"})
    video = {name: value for name, value in processor.items() if name != "image_processor_type"}
    write_json(directory / "video_preprocessor_config.json", {**video, "video_processor_type": "Glm46VVideoProcessor"})


def _read_limits(directory: Path, vision: Mapping[str, Any]) -> ImageLimits:
    """The size of images that the processor's file says. Errors: CheckpointError."""
    shape, processor = glm_ocr.read_shape(vision), read_processor(directory)
    for name, expected in {"resample": _BICUBIC, "do_resize": True, "do_rescale": True, "do_normalize": True}.items():
        if processor.get(name, expected) != expected:
            raise CheckpointError(f"{directory}: {name}={processor[name]!r} of its images is not supported")
    size = {**_SIZE, **(processor.get("size") or {})}
    frames = processor.get("temporal_patch_size", shape.temporal_patch_size)
    unit_px = shape.patch_size * shape.spatial_merge_size
    return ImageLimits(unit_px, size["shortest_edge"] / frames, size["longest_edge"] / frames)
