"""The released directories of the CogVLM family and GLM-4V-9B, read and written: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.decoder import rotary_frequencies
from cogvit.model.layouts import cogagent, cogvlm, cogvlm2, glm4v_9b
from cogvit.model.layouts.causal_lm import read_generation
from cogvit.model.layouts.cog import CogShape
from cogvit.model.layouts.files import CONFIG, read_json, write_json
from cogvit.model.layouts.parts import Parts, Shapes, check_shapes, flat
from cogvit.model.layouts.shards import Stored, planned, stored_tensors, tensors, write_tensors

Layout = Literal["cogvlm", "cogvlm2", "cogagent", "glm4v_9b"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_INV_FREQ = "inv_freq"
_CONVOLUTION = "model.vision.conv.weight"  # of CogVLM2's adapter
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Released:
    """What a released directory holds besides the weights of the model, so that it can be written again.

    Attributes:
        layout: which one.
        values: its config.json.
        plan: file, shape and dtype of every tensor.
        carried: tensors that the model does not run.
        generation: its generation_config.json; None where there is none.
    """

    layout: Layout
    values: dict[str, Any]
    plan: dict[str, Stored]
    carried: dict[str, Tensor]
    generation: dict[str, Any] | None = None


def layout_of(values: Mapping[str, Any]) -> Layout | None:
    """Return which released layout a config.json is of; None where it is of none."""
    if not isinstance(values.get("vision_config"), dict) or not isinstance(values.get("architectures", []), list):
        return None
    said = values.get("architectures") or [""]
    if values.get("model_type") == "chatglm":
        return "glm4v_9b"
    if said[0] == "CogAgentForCausalLM" or "cross_hidden_size" in values:
        return "cogagent"
    if said[0] != "CogVLMForCausalLM" and "template_version" not in values:
        return None
    return "cogvlm2" if "num_multi_query_heads" in values else "cogvlm"


def fitting_layout(shape: CogShape) -> Layout:
    """Return the layout that holds a model of the family.

    Errors: CheckpointError names what the released models do not have.
    """
    language, adapter = shape.language, shape.adapter
    if language.family == "glm":
        return _fitting_glm(shape)
    layout: Layout = "cogagent" if shape.cross is not None else "cogvlm2" if adapter.kind == "conv" else "cogvlm"
    grouped = layout == "cogvlm2"
    kind, pool = ("conv", 2) if grouped else ("swiglu", 1)
    base = 500000.0 if grouped else 10000.0
    biases = language.qkv_bias or language.proj_bias or language.mlp_bias
    asked = {
        "visual experts in every block": language.expert.every == 1,
        f"expert.qkv_bias {grouped}": language.expert.qkv_bias == grouped,
        "as many key-value heads as heads": grouped or language.num_kv_heads == language.num_heads,
        "heads that fill the width": language.num_heads * language.head_dim == language.embed_dim,
        "a Llama without biases": language.family == "llama" and not biases and not language.rope_scaling,
        "a head of its own": not language.tied,
        f"rope_base {base:g}": language.rope_base == base,
        f"an adapter of kind {kind} with spatial_pool {pool}": (adapter.kind, adapter.spatial_pool) == (kind, pool),
        "heads of 64 in the second encoder": shape.cross is None or shape.cross.head_dim == 64,
    }
    _refuse(layout, asked)
    return layout


def _fitting_glm(shape: CogShape) -> Layout:
    language, adapter = shape.language, shape.adapter
    asked = {
        "no visual experts": language.expert.every == 0,
        "no second encoder": shape.cross is None,
        "biases of queries, keys and values alone": language.qkv_bias and not (language.proj_bias or language.mlp_bias),
        "half of a head that turns": language.rotary_fraction == 0.5 and not language.rope_scaling,
        "a head of its own": not language.tied,
        "an adapter of kind wide_conv with spatial_pool 2": (adapter.kind, adapter.spatial_pool) == ("wide_conv", 2),
    }
    _refuse("glm4v_9b", asked)
    return "glm4v_9b"


def _refuse(layout: Layout, asked: Mapping[str, bool]) -> None:
    wrong = [what for what, holds in asked.items() if not holds]
    if wrong:
        raise CheckpointError(f"layout {layout} wants {'; '.join(wrong)}")


def read(directory: Path, layout: Layout, dtype: torch.dtype) -> tuple[CogShape, dict[str, Tensor], Released]:
    """Return the shape, the weights of a `VisionLanguageModel` and what else is there.

    It holds the weights and one tensor of the files at a time.

    Errors: CheckpointError when a file is missing or damaged, a weight is no float, NaN or infinite, or names every
    missing, extra and misshaped weight.
    """
    values, stored = read_json(directory / CONFIG), stored_tensors(directory)
    if layout == "cogvlm" and _CONVOLUTION in stored:  # whose config.json left its groups of heads to their default
        layout = "cogvlm2"
    shapes = {name: entry.shape for name, entry in stored.items()}
    try:
        shape = read_shape(layout, values | read_generation(directory), shapes)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None
    where, beside = parts(layout, shape), carried(layout, shape, shapes)
    if layout == "cogagent":
        beside |= {name: size for name, size in cogagent.optional(shape).items() if name in stored}
    try:
        check_shapes({name: torch.empty(size, device="meta") for name, size in shapes.items()}, flat(where) | beside)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    source = {name: (ours, start) for ours, theirs in where.items() for name, start in _starts(theirs)}
    weights = {ours: torch.empty(_our_shape(ours, theirs), dtype=dtype) for ours, theirs in where.items()}
    kept = {}
    for name, tensor in tensors(directory, stored):
        if name in beside:
            kept[name] = tensor.clone()
            continue
        ours, start = source[name]
        target = weights[ours] if len(where[ours]) == 1 else weights[ours].narrow(0, start, len(tensor))
        found = _in_our_form(tensor, target.shape)
        scale = _scale(layout, values, ours)
        target.copy_(found if scale == 1.0 else found / scale)
    if layout != "glm4v_9b":  # which computes its angles anew
        shape = replace(shape, language=_with_frequencies(shape, kept, directory))
    generation = read_json(directory / _GENERATION) if (directory / _GENERATION).exists() else None
    return shape, weights, Released(layout, values, stored, kept, generation)


def write(
    directory: Path, layout: Layout, shape: CogShape, weights: Mapping[str, Tensor], released: Released | None
) -> None:
    """Write a released directory, one file of weights at a time; the directory is made.

    Args:
        directory: where to.
        layout: of the model.
        shape: of the model.
        weights: of a `VisionLanguageModel`.
        released: what it was read from; its files, precision and config.json are kept. Without it, all is fp32.

    Errors: CheckpointError names every weight that the layout has no place for, lacks or has in another shape.
    """
    where = parts(layout, shape)
    ours = {name: _our_shape(name, theirs) for name, theirs in where.items()}
    check_shapes(weights, ours)
    source = {name: (own, start) for own, theirs in where.items() for name, start in _starts(theirs)}
    if released is None:
        beside = _new_carried(layout, shape)
        released = Released(layout, write_shape(layout, shape), {}, beside)
    sizes = flat(where) | {name: tuple(tensor.shape) for name, tensor in released.carried.items()}
    plan = released.plan or planned(sizes, torch.float32)

    def tensor(name: str) -> Tensor:
        if name in released.carried:
            return released.carried[name]
        own, start = source[name]
        weight = weights[own] if len(where[own]) == 1 else weights[own].narrow(0, start, sizes[name][0])
        scale = _scale(layout, released.values, own)
        return _in_their_form(weight if scale == 1.0 else weight * scale, sizes[name])

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, released.values)
    if released.generation is not None:
        write_json(directory / _GENERATION, released.generation)
    write_tensors(directory, plan, tensor)


def _scale(layout: Layout, values: Mapping[str, Any], ours: str) -> float:
    """By what a stored weight is larger than ours."""
    return glm4v_9b.scale_of(values) if layout == "glm4v_9b" and ours in glm4v_9b.SCALED else 1.0


def parts(layout: Layout, shape: CogShape) -> Parts:
    """Return where the weights of a `VisionLanguageModel` lie in a layout."""
    match layout:
        case "cogvlm":
            return cogvlm.parts(shape)
        case "cogvlm2":
            return cogvlm2.parts(shape)
        case "cogagent":
            return cogagent.parts(shape)
        case "glm4v_9b":
            return glm4v_9b.parts(shape)


def carried(layout: Layout, shape: CogShape, stored: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return what a layout stores that the model does not run."""
    match layout:
        case "cogvlm":
            return cogvlm.carried(shape)
        case "cogvlm2":
            return cogvlm2.carried(shape)
        case "cogagent":
            return cogagent.carried(shape, stored)
        case "glm4v_9b":
            return glm4v_9b.carried(shape)


def read_shape(layout: Layout, values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> CogShape:
    """Return the model that a config.json describes; of CogAgent's second encoder the stored shapes say more.

    Errors: CheckpointError or ValueError.
    """
    match layout:
        case "cogvlm":
            return cogvlm.read_shape(values)
        case "cogvlm2":
            return cogvlm2.read_shape(values)
        case "cogagent":
            return cogagent.read_shape(values, stored)
        case "glm4v_9b":
            return glm4v_9b.read_shape(values)


def write_shape(layout: Layout, shape: CogShape) -> dict[str, Any]:
    """Return a config.json."""
    match layout:
        case "cogvlm":
            return cogvlm.write_shape(shape)
        case "cogvlm2":
            return cogvlm2.write_shape(shape)
        case "cogagent":
            return cogagent.write_shape(shape)
        case "glm4v_9b":
            return glm4v_9b.write_shape(shape)


def _new_carried(layout: Layout, shape: CogShape) -> dict[str, Tensor]:
    """What a model that was never released stores: its angles, and zeros where nothing is run."""
    angles = rotary_frequencies(shape.language, torch.device("cpu"))
    names = carried(layout, shape, {})
    return {name: angles.clone() if name.endswith(_INV_FREQ) else torch.zeros(size) for name, size in names.items()}


def _with_frequencies(shape: CogShape, kept: Mapping[str, Tensor], directory: Path) -> Any:
    """The decoder with the angles that a checkpoint stores: the released ones are rounded to bf16.

    Errors: CheckpointError when blocks have different ones.
    """
    found = [tensor.float() for name, tensor in kept.items() if name.endswith(_INV_FREQ)]
    if any(not torch.equal(found[0], other) for other in found):
        raise CheckpointError(f"{directory}: {_INV_FREQ} differs between blocks; a model has one rotation")
    exact = rotary_frequencies(shape.language, torch.device("cpu"))
    same = torch.equal(found[0], exact)
    return shape.language if same else replace(shape.language, rope_frequencies=tuple(found[0].tolist()))


def _starts(theirs: Shapes) -> list[tuple[str, int]]:
    rows = [size[0] for size in theirs.values()]
    return [(name, sum(rows[:number])) for number, name in enumerate(theirs)]


def _our_shape(ours: str, theirs: Shapes) -> tuple[int, ...]:
    """Rows of several tensors together; without leading ones; a convolution of groups as a matrix."""
    first = next(iter(theirs.values()))
    if len(theirs) > 1:
        return (sum(size[0] for size in theirs.values()), *first[1:])
    if ours == "adapter.downsample.weight":
        return (first[0], first[1] * first[2] * first[3])
    return first[1:] if len(first) == 3 else first


def _in_our_form(tensor: Tensor, size: torch.Size) -> Tensor:
    """A stored tensor in the shape of ours: the patches of a group lie side by side, each with its channels."""
    return tensor.permute(0, 2, 3, 1).reshape(size) if tensor.ndim == 4 and len(size) == 2 else tensor.reshape(size)


def _in_their_form(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    if len(size) == 4 and weight.ndim == 2:
        rows, channels, height, width = size
        return weight.reshape(rows, height, width, channels).permute(0, 3, 1, 2)
    return weight.reshape(size)
