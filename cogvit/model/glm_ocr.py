"""The vision tower of GLM-OCR as transformers stores it (`GlmOcrVisionModel`): its shape and weights, both ways.

Its blocks, norms and rotary positions are those of the `cogvit_l` family. What differs: a patch holds several frames,
the gate and the up projection are two matrices, a merger for the language model follows (our `GlmAdapter`), and there
is no mask token. Everything comes out in fp32.

Source: transformers 5.23, models/glm_ocr/modeling_glm_ocr.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.config import CogViTConfig
from cogvit.model.init import init_tensor
from cogvit.model.layouts.parts import Parts, Shapes, check_shapes, flat, split, stack
from cogvit.model.preprocess import Preprocessing

MODEL_TYPE, VISION_TYPE = "glm_ocr", "glm_ocr_vision"
IMAGE_MEAN, IMAGE_STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]  # what brings [0, 1] to [-1, 1]
_ROPE = {"rope_type": "axial", "rope_theta": 10_000.0}
_NO_LIMIT = 1e30
_FAMILY = {  # what a CogViT must be to fit
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "position": "rotary",
    "use_cls_token": False,
    "use_qk_norm": True,
    "norm_after": False,
    "qkv_bias": True,
    "proj_bias": True,
    "layer_scale_init": None,
}


@dataclass(frozen=True)
class GlmOcrShape:
    """What shapes the weights; names and defaults are those of transformers' GlmOcrVisionConfig."""

    depth: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    intermediate_size: int = 4096
    in_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    temporal_patch_size: int = 2  # frames of a patch; an image is repeated
    rms_norm_eps: float = 1e-5
    spatial_merge_size: int = 2
    out_hidden_size: int = 1536  # width of the language model


def read_shape(values: Mapping[str, Any]) -> GlmOcrShape:
    """Return the shape that a config.json describes.

    Errors: CheckpointError for an activation, bias, rotation or oblong size that CogViT does not have.
    """
    given = {"hidden_act": "silu", "attention_bias": True, **values, **_ROPE, **(values.get("rope_parameters") or {})}
    for name, expected in {"hidden_act": "silu", "attention_bias": True, **_ROPE}.items():
        if given[name] != expected:
            raise CheckpointError(f"{name}={given[name]!r} of this GLM-OCR is not supported; expected {expected!r}")
    known = {field.name: values[field.name] for field in fields(GlmOcrShape) if field.name in values}
    for name in ("image_size", "patch_size", "temporal_patch_size"):
        side = known.get(name)
        if isinstance(side, (list, tuple)):
            if len(set(side)) != 1:
                raise CheckpointError(f"{name}={side} of this GLM-OCR is not supported; expected one number")
            known[name] = side[0]
    return GlmOcrShape(**known)


def cogvit_config(shape: GlmOcrShape) -> CogViTConfig:
    """Return our configuration. Errors: ValueError for shapes that no encoder has."""
    return CogViTConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        in_chans=shape.in_channels,
        embed_dim=shape.hidden_size,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=shape.intermediate_size / shape.hidden_size,
        eps=shape.rms_norm_eps,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        use_cls_token=False,
    )


def shape_of(cfg: CogViTConfig) -> GlmOcrShape:
    """Return the shape of an encoder of the `cogvit_l` family.

    Errors: CheckpointError names every option that a GlmOcrVisionModel does not have.
    """
    problems = [
        f"{name}={getattr(cfg, name)!r}, expected {expected!r}"
        for name, expected in _FAMILY.items()
        if getattr(cfg, name) != expected
    ]
    if problems:
        raise CheckpointError(f"the layout of GLM-OCR cannot hold this encoder: {'; '.join(problems)}")
    return GlmOcrShape(
        depth=cfg.depth,
        hidden_size=cfg.embed_dim,
        num_heads=cfg.num_heads,
        intermediate_size=cfg.mlp_dim,
        in_channels=cfg.in_chans,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        rms_norm_eps=cfg.eps,
    )


def write_shape(shape: GlmOcrShape, family: Literal["glm_ocr", "glm5_next"] = "glm_ocr") -> dict[str, Any]:
    """Return a shape as the config.json that transformers reads for the vision model of a family.

    GLM-5-Next's tower clamps its MLP's branches, at 10 by default; ours does not, so its limit is out of reach.
    """
    own: dict[str, Any] = {"model_type": VISION_TYPE, "architectures": ["GlmOcrVisionModel"]}
    if family == "glm5_next":
        own = {"model_type": "glm5_next_vision", "architectures": ["Glm5NextVisionModel"], "swiglu_limit": _NO_LIMIT}
    rest = {"hidden_act": "silu", "attention_bias": True, "rope_parameters": _ROPE, "dtype": "float32"}
    return {**own, **asdict(shape), **rest}


def write_sizes(shape: GlmOcrShape, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return how training resized images, in the words of transformers' processor: our filter, the nearest sizes.

    Its rule counts pixels of all frames and rounds sides to the nearest group; ours fits the grid to a budget.
    """
    patch_px = shape.temporal_patch_size * shape.patch_size**2
    most = preprocessing.max_patches * patch_px
    least = most if preprocessing.enlarge else patch_px * shape.spatial_merge_size**2
    return {"resample": 2, "size": {"shortest_edge": least, "longest_edge": most}}  # 2: bilinear


def preprocessing_of(values: Mapping[str, Any], cfg: CogViTConfig) -> Preprocessing:
    """Return how the images of a GLM-OCR checkpoint are prepared, in our terms: the same budget, in whole groups.

    Errors: CheckpointError for a number that cannot be.
    """
    size, frames = values.get("size") or {}, values.get("temporal_patch_size", 2)
    most = size.get("longest_edge", frames * cfg.patch_size**2 * cfg.naflex_max_tokens)
    try:
        budget = int(most) // (int(frames) * cfg.patch_size**2)
        return Preprocessing(min(budget, cfg.naflex_max_tokens), multiple=int(values.get("merge_size", 2)))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"preprocessor_config.json: {error}") from None


def write_processor(shape: GlmOcrShape) -> dict[str, Any]:
    """Return how images are prepared, as the preprocessor_config.json that transformers reads."""
    return {
        "image_processor_type": "Glm46VImageProcessor",
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "patch_size": shape.patch_size,
        "temporal_patch_size": shape.temporal_patch_size,
        "merge_size": shape.spatial_merge_size,
    }


def tower_from_glm_ocr(weights: Mapping[str, Tensor], shape: GlmOcrShape) -> dict[str, Tensor]:
    """Return the weights of a `CogViT`; the frames of a patch are summed, which is exact for images.

    The mask token, which is not there, gets the value that training starts from.

    Errors: CheckpointError names every missing, extra and misshaped weight; the merger's are not looked at.
    """
    plain = stack({name: weight for name, weight in weights.items() if not _of_merger(name)}, _tower(shape))
    plain["patch_embed.proj.weight"] = plain["patch_embed.proj.weight"].sum(2)
    plain["mask_token"] = init_tensor("vision.mask_token", (1, 1, shape.hidden_size), seed=0)
    return plain


def tower_to_glm_ocr(weights: Mapping[str, Tensor], shape: GlmOcrShape) -> dict[str, Tensor]:
    """Return a `CogViT`'s weights under the names there, without the mask token."""
    theirs, frames = split(weights, _tower(shape)), shape.temporal_patch_size
    kernel_DCPP = theirs["patch_embed.proj.weight"] / frames
    return {**theirs, "patch_embed.proj.weight": repeat(kernel_DCPP, "d c p q -> d c frames p q", frames=frames)}


def adapter_from_glm_ocr(weights: Mapping[str, Tensor], shape: GlmOcrShape) -> dict[str, Tensor]:
    """Return the weights of a `GlmAdapter` from those of the merger.

    Errors: CheckpointError names every missing, extra and misshaped weight; the tower's are not looked at.
    """
    plain = stack({name: weight for name, weight in weights.items() if _of_merger(name)}, _merger(shape))
    return {**plain, "downsample.weight": rearrange(plain["downsample.weight"], "e d p q -> e (p q d)")}


def adapter_to_glm_ocr(weights: Mapping[str, Tensor], shape: GlmOcrShape) -> dict[str, Tensor]:
    """Return a `GlmAdapter`'s weights under the names there.

    Errors: CheckpointError when its width or hidden width is not the merger's, which is in_channels times as wide.
    """
    theirs, pool = split(weights, _merger(shape)), shape.spatial_merge_size
    kernel = theirs["downsample.weight"]
    theirs["downsample.weight"] = rearrange(kernel, "e (p q d) -> e d p q", p=pool, q=pool)
    check_shapes(theirs, flat(_merger(shape)))
    return theirs


def fold_normalization(weights: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Return a `CogViT`'s weights for images in [-1, 1] from those for (images in [0, 1] - mean) / std."""
    kernel_DCPP, mean_C, std_C = weights["patch_embed.proj.weight"], torch.tensor(mean), torch.tensor(std)
    shift_D = (kernel_DCPP.sum((2, 3)) * (0.5 - mean_C) / std_C).sum(1)
    scaled_DCPP = kernel_DCPP * (0.5 / std_C)[:, None, None]
    bias_D = weights["patch_embed.proj.bias"] + shift_D
    return {**weights, "patch_embed.proj.weight": scaled_DCPP, "patch_embed.proj.bias": bias_D}


def _of_merger(name: str) -> bool:
    return name.startswith(("downsample.", "merger."))


def _tower(shape: GlmOcrShape) -> Parts:
    dim, mlp, head = shape.hidden_size, shape.intermediate_size, shape.hidden_size // shape.num_heads
    patch = (shape.in_channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    parts: Parts = {
        "patch_embed.proj.weight": {"patch_embed.proj.weight": (dim, *patch)},
        "patch_embed.proj.bias": {"patch_embed.proj.bias": (dim,)},
        "norm.weight": {"post_layernorm.weight": (dim,)},
    }
    same: Shapes = {
        "norm1.weight": (dim,),
        "norm2.weight": (dim,),
        "attn.q_norm.weight": (head,),
        "attn.k_norm.weight": (head,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
    }
    for block in (f"blocks.{layer}." for layer in range(shape.depth)):
        parts.update({block + name: {block + name: size} for name, size in same.items()})
        for kind, columns in (("weight", (dim,)), ("bias", ())):
            gate_up = (f"{block}mlp.gate_proj.{kind}", f"{block}mlp.up_proj.{kind}")
            parts[f"{block}mlp.fc1.{kind}"] = dict.fromkeys(gate_up, (mlp, *columns))
        parts[f"{block}mlp.fc2.weight"] = {f"{block}mlp.down_proj.weight": (dim, mlp)}
        parts[f"{block}mlp.fc2.bias"] = {f"{block}mlp.down_proj.bias": (dim,)}
    return parts


def _merger(shape: GlmOcrShape) -> Parts:
    out, pool = shape.out_hidden_size, shape.spatial_merge_size
    hidden = out * shape.in_channels  # as transformers has it
    return {
        "downsample.weight": {"downsample.weight": (out, shape.hidden_size, pool, pool)},
        "downsample.bias": {"downsample.bias": (out,)},
        "proj.weight": {"merger.proj.weight": (out, out)},
        "norm.weight": {"merger.post_projection_norm.weight": (out,)},
        "norm.bias": {"merger.post_projection_norm.bias": (out,)},
        "fc1.weight": dict.fromkeys(("merger.gate_proj.weight", "merger.up_proj.weight"), (hidden, out)),
        "fc2.weight": {"merger.down_proj.weight": (out, hidden)},
    }
