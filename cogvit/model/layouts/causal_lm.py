"""Causal language models as transformers stores them (Llama, GLM, GLM-4, Qwen3): shape and weights, both ways.

Queries, keys and values are three matrices there, gate and up projection two (one in GLM). Everything comes out in
fp32.

Source: transformers 5.23, models/{llama,glm,glm4,qwen3}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvit.errors import CheckpointError
from cogvit.model.config import MmtpConfig
from cogvit.model.language_config import FAMILIES, LanguageConfig, RopeScaling, mrope_section
from cogvit.model.layouts.files import CONFIG, check_numbers, read_json, read_weights, write_files, write_json
from cogvit.model.layouts.parts import Parts, Shapes, split, stack

_GENERATION = "generation_config.json"
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES = {  # ours -> theirs, which a config.json must name
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
_GLM = {
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers, where a config.json is silent
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "glm": _GLM,
    "glm4": _GLM,
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
}
_FUSED = ("glm", "glm4")  # one matrix for gate and up projection; a head turns in part
_EXPECTED = {"hidden_act": "silu", "attention_dropout": 0, "use_sliding_window": False, "quantization_config": None}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_causal_lm(directory: Path) -> tuple[LanguageConfig, dict[str, Tensor]]:
    """Read config.json, generation_config.json and the weights of a `...ForCausalLM`.

    Errors: CheckpointError when a file is missing or damaged, the family or an option is not ours, a weight is no
    float, NaN or infinite, or names every missing, extra and misshaped weight.
    """
    values, weights = read_json(directory / CONFIG), read_weights(directory, "")
    cfg = with_heads(directory, read_shape(directory), values, weights, "model.")
    return cfg, from_causal_lm(directory, weights, cfg)


def read_shape(directory: Path) -> LanguageConfig:
    """Read config.json and generation_config.json, and no weights. Errors: as `read_causal_lm`."""
    values = read_json(directory / CONFIG) | read_generation(directory)
    try:
        return language_config(values)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None


def read_generation(directory: Path) -> dict[str, Any]:
    """Return what ends and fills up an answer, which many say in generation_config.json alone."""
    if not (directory / _GENERATION).exists():
        return {}
    said = read_json(directory / _GENERATION)
    return {name: said[name] for name in ("eos_token_id", "pad_token_id") if said.get(name) is not None}


def write_generation(directory: Path, cfg: LanguageConfig) -> None:
    """Write generation_config.json."""
    write_json(directory / _GENERATION, {"_from_model_config": True, **special_ids(cfg)})


def from_causal_lm(
    directory: Path, weights: dict[str, Tensor], cfg: LanguageConfig, prefix: str = "model."
) -> dict[str, Tensor]:
    """Return a `CausalLM`'s weights from those of transformers, read from a directory. Errors: CheckpointError."""
    check_numbers(directory, weights)
    if cfg.tied:
        weights.pop("lm_head.weight", None)  # some store it twice
    known = {name: weight for name, weight in weights.items() if not _is_copy(name)}
    try:
        return stack(known, causal_lm_parts(cfg, prefix))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _is_copy(name: str) -> bool:
    """Whether it repeats what the model has elsewhere: rotations, and the two tables in the heads for more tokens."""
    tables = "layers." in name and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
    return tables or name.endswith("rotary_emb.inv_freq")


def with_heads(
    directory: Path, cfg: LanguageConfig, values: Mapping[str, Any], weights: Mapping[str, Tensor], prefix: str
) -> LanguageConfig:
    """Return the shape with the heads for more tokens that are among the weights: layers behind the last one.

    Errors: CheckpointError when the config.json describes them wrongly.
    """
    layers = {int(name.split(".")[2 - (not prefix)]) for name in weights if name.startswith(f"{prefix}layers.")}
    found = len([layer for layer in layers if layer >= cfg.depth])
    if not found:
        return cfg
    try:
        return replace(cfg, mmtp=MmtpConfig(**{"depths": found, "share": found == 1, **(values.get("mmtp") or {})}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None


def write_causal_lm(directory: Path, cfg: LanguageConfig, weights: Mapping[str, Tensor]) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained` of transformers reads; the directory is made.

    Errors: CheckpointError when the model has visual experts or cross attention.
    """
    if cfg.expert.every or cfg.cross.dim:
        raise CheckpointError(
            f"a {_CLASSES[cfg.family]} of transformers holds no visual experts and no cross attention; save the whole"
            " vision-language model"
        )
    family = {"model_type": cfg.family, "architectures": [_CLASSES[cfg.family]], "dtype": "float32"}
    write_files(directory, {**family, **config_values(cfg)}, split(weights, causal_lm_parts(cfg)))
    write_generation(directory, cfg)


def language_config(values: Mapping[str, Any]) -> LanguageConfig:
    """Return the shape that a config.json describes.

    Errors: CheckpointError for another family, a missing size or an option that `CausalLM` does not have.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"model_type is {family!r}; a CausalLM is one of {', '.join(FAMILIES)}")
    missing = [name for name in _SIZES.values() if not isinstance(values.get(name), int)]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} must be whole numbers")
    for name, expected in _EXPECTED.items():
        if values.get(name) not in (expected, None):
            raise CheckpointError(f"{name}={values[name]!r} is not supported; expected {expected!r}")
    sizes = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    said = _DEFAULTS[family] | {name: value for name, value in values.items() if value is not None}
    rope = _rope(said)
    head_dim = said.get("head_dim", sizes["embed_dim"] // sizes["num_heads"])
    fraction = rope.get("partial_rotary_factor", 1.0) if family in _FUSED else 1.0
    section = rope.get("mrope_section", mrope_section(int(head_dim * fraction) // 2)) if family == "glm4" else None
    bias = bool(said.get("attention_bias", False))
    return LanguageConfig(
        family=family,
        **sizes,
        num_kv_heads=said.get("num_key_value_heads", sizes["num_heads"]),
        head_dim=head_dim,
        max_tokens=said["max_position_embeddings"],
        eps=said["rms_norm_eps"],
        rope_base=float(rope["rope_theta"]),
        rope_scaling=_scaling(rope),
        rotary_fraction=fraction,
        mrope_section=None if section is None else tuple(section),
        qkv_bias=bias,
        proj_bias=bias and family not in _FUSED,
        mlp_bias=family == "llama" and bool(said.get("mlp_bias", False)),
        tied=bool(said.get("tie_word_embeddings", False)),
        **read_ids(values),
    )


def config_values(cfg: LanguageConfig) -> dict[str, Any]:
    """Return a shape as the fields of a config.json there."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dict(zip(_LLAMA3, asdict(cfg.rope_scaling).values(), strict=True))}
    if cfg.family in _FUSED:
        rope["partial_rotary_factor"] = cfg.rotary_fraction
        if cfg.mrope_section not in (None, mrope_section(cfg.rotary_dim // 2)):
            rope["mrope_section"] = list(cfg.mrope_section)
    return {
        **{theirs: getattr(cfg, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_tokens,
        "rms_norm_eps": cfg.eps,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "attention_bias": cfg.qkv_bias,
        **({"mlp_bias": cfg.mlp_bias} if cfg.family == "llama" else {}),
        "tie_word_embeddings": cfg.tied,
        **({"num_nextn_predict_layers": cfg.mmtp.num_layers, "mmtp": asdict(cfg.mmtp)} if cfg.mmtp.depths else {}),
        **special_ids(cfg),
    }


def causal_lm_parts(cfg: LanguageConfig, prefix: str = "model.") -> Parts:
    """Return where our weights lie; `prefix` stands before all names there but the head's."""
    dim, head_dim, mlp = cfg.embed_dim, cfg.head_dim, cfg.mlp_dim
    q, kv = cfg.num_heads * head_dim, cfg.num_kv_heads * head_dim
    parts: Parts = {
        "embed.weight": {f"{prefix}embed_tokens.weight": (cfg.vocab_size, dim)},
        "norm.weight": {f"{prefix}norm.weight": (dim,)},
    }
    if not cfg.tied:
        parts["head.weight"] = {"lm_head.weight": (cfg.vocab_size, dim)}
    norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if cfg.sandwich_norm:
        norms |= {"post_norm1": "post_self_attn_layernorm", "post_norm2": "post_mlp_layernorm"}
    gate_up = {"gate_up_proj": 2 * mlp} if cfg.family in _FUSED else {"gate_proj": mlp, "up_proj": mlp}
    linear = {  # ours -> columns, bias, and the matrices there with their rows
        "attn.qkv": (dim, cfg.qkv_bias, {f"self_attn.{x}_proj": n for x, n in (("q", q), ("k", kv), ("v", kv))}),
        "attn.proj": (q, cfg.proj_bias, {"self_attn.o_proj": dim}),
        "mlp.fc1": (dim, cfg.mlp_bias, {f"mlp.{name}": rows for name, rows in gate_up.items()}),
        "mlp.fc2": (mlp, cfg.mlp_bias, {"mlp.down_proj": dim}),
    }
    places = {f"blocks.{layer}.": f"{prefix}layers.{layer}." for layer in range(cfg.depth)}
    for head in range(cfg.mmtp.num_layers):
        ours, theirs = f"mtp.layers.{head}.", f"{prefix}layers.{cfg.depth + head}."
        places[f"{ours}blocks.0."] = theirs
        named = {"enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm"}
        parts |= {f"{ours}{a}.weight": {f"{theirs}{b}.weight": (dim,)} for a, b in named.items()}
        parts[f"{ours}eh_proj.weight"] = {f"{theirs}eh_proj.weight": (dim, 2 * dim)}
    if cfg.mmtp.depths and cfg.mmtp.images == "tokens":
        parts["mtp.image_token"] = {f"{prefix}mtp_image_token": (cfg.mmtp.tokens, dim)}
    for ours, theirs in places.items():
        parts |= {f"{ours}{a}.weight": {f"{theirs}{b}.weight": (dim,)} for a, b in norms.items()}
        if cfg.qk_norm:
            names = ("q_norm.weight", "k_norm.weight")
            parts |= {f"{ours}attn.{name}": {f"{theirs}self_attn.{name}": (head_dim,)} for name in names}
        for name, (columns, bias, rows) in linear.items():
            weight: Shapes = {f"{theirs}{matrix}.weight": (n, columns) for matrix, n in rows.items()}
            parts[f"{ours}{name}.weight"] = weight
            if bias:
                parts[f"{ours}{name}.bias"] = {f"{theirs}{matrix}.bias": (n,) for matrix, n in rows.items()}
    return parts


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation of a config.json, new form or old. Errors: CheckpointError."""
    rope = {"rope_theta": values.get("rope_theta", 10000.0)}
    if "partial_rotary_factor" in values:
        rope["partial_rotary_factor"] = values["partial_rotary_factor"]
    rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"rope_type={kind!r} is not supported; expected 'default' or 'llama3'")
    rope["rope_type"] = kind
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        missing = [name for name in _LLAMA3 if name not in rope]
        if missing:
            raise CheckpointError(f"the llama3 rotation lacks {', '.join(missing)}")
    return rope


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    return RopeScaling(*(rope[name] for name in _LLAMA3)) if rope["rope_type"] == "llama3" else None


def read_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids that begin, end and fill up texts, as the fields of a shape, from a config.json's.

    Errors: CheckpointError names one that is no whole number.
    """
    eos, pad = values.get("eos_token_id"), read_id(values, "pad_token_id")
    ends = [read_id({"eos_token_id": one}, "eos_token_id") for one in (eos if isinstance(eos, list) else [eos])]
    eos_ids = tuple(one for one in ends if one is not None)
    # Some say by -1 that there is none.
    return {"eos_ids": eos_ids, "bos_id": read_id(values, "bos_token_id"), "pad_id": None if pad == -1 else pad}


def read_id(values: Mapping[str, Any], name: str) -> int | None:
    """Return a token's id from a config.json. Errors: CheckpointError when it is no whole number."""
    found = values.get(name)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise CheckpointError(f"{name}={found!r} must be a whole number")
    return found


def special_ids(cfg: LanguageConfig) -> dict[str, Any]:
    """Return the ids that begin, end and fill up texts, as a config.json there names them, None said outright."""
    eos = list(cfg.eos_ids)
    ends = eos[0] if len(eos) == 1 else eos or None
    return {"bos_token_id": cfg.bos_id, "pad_token_id": cfg.pad_id, "eos_token_id": ends}
