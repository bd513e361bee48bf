"""Directories of vision-language models, read as the parts that a model is put together from, and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cogvit.errors import CheckpointError
from cogvit.model.adapter import GlmAdapter, PatchGroups, adapter_config, make_adapter
from cogvit.model.config import CrossModuleConfig, ExpertConfig, VideoConfig
from cogvit.model.eva import EvaEncoder, cross_module, second_encoder
from cogvit.model.eva_training import eva_encoder
from cogvit.model.expert import is_grown
from cogvit.model.frame import ImageFrame
from cogvit.model.image_input import ImageLimits, ImageSize, SquareImages
from cogvit.model.interop import load_checked
from cogvit.model.language import CausalLM
from cogvit.model.language_config import CrossConfig, cross_of
from cogvit.model.layouts import glm_ocr_full, released, vision_language
from cogvit.model.layouts.causal_lm import write_causal_lm
from cogvit.model.layouts.cog import CogShape
from cogvit.model.layouts.files import CONFIG, read_json
from cogvit.model.layouts.parts import check_shapes
from cogvit.model.pretrained import load_tokenizer
from cogvit.model.pretrained_language import PretrainedLanguage, load_language
from cogvit.model.questions import Questions
from cogvit.model.vit import CogViT


class VlmParts(NamedTuple):
    """What a `VisionLanguageModel` is built of, in the order that it takes them."""

    vision: CogViT | EvaEncoder
    adapter: PatchGroups
    language: CausalLM | PretrainedLanguage
    image_token_id: int
    limits: ImageSize
    tokenizer: Any = None
    frame: ImageFrame | None = None
    cross: EvaEncoder | None = None
    questions: Questions | None = None
    released: released.Released | None = None
    video: VideoConfig = VideoConfig()

    def modules(self) -> nn.ModuleDict:
        """Return what has weights, under the names of a `VisionLanguageModel`."""
        named = {name: value for name, value in self._asdict().items() if isinstance(value, nn.Module)}
        return nn.ModuleDict(named)


def read_parts(root: Path, dtype: torch.dtype) -> VlmParts:
    """Read a directory of ours, of GLM-OCR or of the CogVLM family.

    Args:
        root: the directory.
        dtype: of the weights of the CogVLM family; others come in fp32.

    Errors: CheckpointError when a file is missing or damaged, or names every missing, extra or misshaped weight;
    ValueError when parts do not fit each other.
    """
    layout = released.layout_of(read_json(root / CONFIG))
    if layout is not None:
        return _read_released(root, layout, dtype)
    if vision_language.model_type(root) == glm_ocr_full.MODEL_TYPE:
        cfg, weights, token_id, limits = glm_ocr_full.read(root)
        language, adapter = CausalLM.from_weights(cfg, weights), GlmAdapter.from_pretrained(root)
        return VlmParts(CogViT.from_pretrained(root), adapter, language, token_id, limits, load_tokenizer(root))
    return _read_ours(root)


def save_ours(root: Path, parts: VlmParts) -> None:
    """Write a directory of directories. Errors: CheckpointError names what it cannot hold."""
    if not isinstance(parts.vision, CogViT) or not isinstance(parts.limits, ImageLimits):
        raise CheckpointError("this layout holds a CogViT that sees images in their own size, and none of one size")
    parts.vision.save_pretrained(root / vision_language.VISION)
    weights: dict[str, Tensor] = {}
    if isinstance(parts.language, CausalLM):
        cfg, weights = parts.language.cfg, parts.language.state_dict()
        plain = {name: weight for name, weight in weights.items() if not is_grown(name)}
        alone = replace(cfg, expert=ExpertConfig(), cross=CrossConfig())
        write_causal_lm(root / vision_language.LANGUAGE, alone, plain)
    else:
        parts.language.save_pretrained(root / vision_language.LANGUAGE)
    if grown := _grown(parts, weights):
        vision_language.write_expert(root, grown)
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(root / vision_language.LANGUAGE)
    adapter = adapter_config(parts.adapter)
    sizes, video = (parts.limits.min_pixels, parts.limits.max_pixels), parts.video
    joint = vision_language.Joint(parts.image_token_id, *sizes, adapter, parts.adapter.state_dict(), video)
    vision_language.write(root, joint)


def _grown(parts: VlmParts, weights: dict[str, Tensor]) -> vision_language.Grown:
    cross, shape = CrossModuleConfig(), parts.language.cfg
    own = {name: weight for name, weight in weights.items() if is_grown(name)}
    if parts.frame is not None:
        own |= {f"frame.{name}": weight for name, weight in parts.frame.state_dict().items()}
    if parts.cross is not None:
        cross = cross_module(parts.cross.cfg, shape.cross.dim)
        own |= {f"cross.{name}": weight.detach() for name, weight in parts.cross.named_parameters()}
    return vision_language.Grown(shape.expert, parts.frame is not None, own, cross)


def save_released(root: Path, parts: VlmParts, layout: released.Layout | None) -> None:
    """Write a directory of the CogVLM family; None is the layout that fits. Errors: CheckpointError names why not."""
    if parts.frame is None:
        raise CheckpointError(f"layout {layout} holds visual experts and learned tokens around images; there are none")
    if isinstance(parts.vision, CogViT):
        parts = parts._replace(vision=eva_encoder(parts.vision, parts.limits, output_position=parts.cross is not None))
    vision, cross = parts.vision, None if parts.cross is None else parts.cross.cfg
    if not isinstance(parts.language, CausalLM):
        raise CheckpointError(f"layout {layout} cannot hold a language model of family {parts.language.cfg.family}")
    assert isinstance(vision, EvaEncoder)
    questions = parts.questions or Questions("chat", "cogvlm" if cross is None else "cogagent")
    adapter = adapter_config(parts.adapter)
    shape = CogShape(parts.language.cfg, vision.cfg, adapter, parts.image_token_id, questions, cross)
    fitting = released.fitting_layout(shape)
    if layout not in (None, fitting):
        raise CheckpointError(f"layout {layout} cannot hold this model, whose layout is {fitting}")
    released.write(root, fitting, shape, parts.modules().state_dict(), parts.released)
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(root)


def save_glm_ocr_full(root: Path, parts: VlmParts) -> None:
    """Write a whole GLM-OCR. Errors: CheckpointError names what it cannot hold."""
    if not isinstance(parts.vision, CogViT) or not isinstance(parts.limits, ImageLimits):
        raise CheckpointError(f"the layout of GLM-OCR cannot hold a {type(parts.vision).__name__}; expected a CogViT")
    if not isinstance(parts.adapter, GlmAdapter):
        kind = adapter_config(parts.adapter).kind
        raise CheckpointError(f"the layout of GLM-OCR cannot hold an adapter of kind {kind}; expected glm")
    if not isinstance(parts.language, CausalLM):
        family = parts.language.cfg.family
        raise CheckpointError(f"the layout of GLM-OCR cannot hold a language model of family {family}; expected glm4")
    if parts.frame is not None:
        raise CheckpointError("the layout of GLM-OCR cannot hold visual experts and learned tokens around images")
    glm_ocr_full.write(
        root,
        (parts.vision.cfg, parts.vision.state_dict()),
        parts.adapter.state_dict(),
        (parts.language.cfg, parts.language.state_dict()),
        parts.limits,
        parts.tokenizer,
    )


def _read_released(root: Path, layout: released.Layout, dtype: torch.dtype) -> VlmParts:
    shape, weights, beside = released.read(root, layout, dtype)
    llm_dim, vision, cross = shape.language.embed_dim, shape.vision, shape.cross
    with torch.device("meta"):  # the weights take their places without new ones drawn first
        adapter = make_adapter(shape.adapter, vision.embed_dim, llm_dim)
        parts = VlmParts(
            EvaEncoder(vision),
            adapter,
            CausalLM(shape.language),
            shape.image_token_id,
            SquareImages(vision.patch_size * adapter.spatial_pool, vision.image_size),
            load_tokenizer(root),
            ImageFrame(llm_dim),
            None if cross is None else EvaEncoder(cross),
            shape.questions,
            beside,
        )
    parts.modules().load_state_dict(weights, assign=True)
    return parts


def _read_ours(root: Path) -> VlmParts:
    joint = vision_language.read(root)
    vision = CogViT.from_pretrained(root / vision_language.VISION)
    language, frame, cross = _read_grown(root)
    adapter = make_adapter(joint.adapter, vision.cfg.embed_dim, language.cfg.embed_dim)
    try:
        load_checked(adapter, joint.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: its adapter: {error}") from None
    limits = ImageLimits(vision.cfg.patch_size * adapter.spatial_pool, joint.min_pixels, joint.max_pixels)
    tokenizer = load_tokenizer(root / vision_language.LANGUAGE)
    return VlmParts(vision, adapter, language, joint.image_token_id, limits, tokenizer, frame, cross, video=joint.video)


def _read_grown(root: Path) -> tuple[CausalLM | PretrainedLanguage, ImageFrame | None, EvaEncoder | None]:
    """The language model with what grew on it, the tokens around images and the second encoder.

    Errors: CheckpointError, ValueError.
    """
    grown, language = vision_language.read_expert(root), load_language(root / vision_language.LANGUAGE)
    frame = ImageFrame(language.cfg.embed_dim) if grown.framed else None
    cross = EvaEncoder(second_encoder(grown.cross)) if grown.cross.image_size else None
    if not isinstance(language, CausalLM):
        return language.with_experts(grown.expert) if grown.expert.every else language, frame, cross
    if not grown:
        return language, frame, cross
    with torch.device("meta"):
        shape = CausalLM(replace(language.cfg, expert=grown.expert, cross=cross_of(grown.cross)))
    beside = nn.ModuleDict({name: part for name, part in (("frame", frame), ("cross", cross)) if part is not None})
    own = {name: weight for name, weight in shape.named_parameters() if is_grown(name)}
    own |= dict(beside.named_parameters())
    try:
        check_shapes(grown.weights, {name: tuple(weight.shape) for name, weight in own.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{root / vision_language.EXPERT}: {error}") from None
    with torch.no_grad():
        for name, weight in beside.named_parameters():
            weight.copy_(grown.weights[name])
    blocks = {name: weight for name, weight in grown.weights.items() if is_grown(name)}
    if blocks:
        language = CausalLM.from_weights(shape.cfg, language.state_dict() | blocks)
        for name, weight in language.named_parameters():
            weight.requires_grad_(is_grown(name))
    return language, frame, cross
