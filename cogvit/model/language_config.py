"""The shape of a causal language model, and what its family does differently from the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cogvit.errors import ConfigError
from cogvit.model.config import CrossModuleConfig, ExpertConfig, MmtpConfig

Family = Literal["llama", "glm", "glm4", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "glm", "glm4", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches slow rotations for contexts longer than those of its pretraining.

    Attributes:
        factor: by which the slowest rotations are slowed down.
        low_freq_factor: rotations with a wave longer than original_max_tokens over this are the slow ones.
        high_freq_factor: those with a wave shorter than original_max_tokens over this stay; between them it blends.
        original_max_tokens: the context of the pretraining.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True)
class CrossConfig:
    """Cross attention of every block to an image of high resolution.

    Attributes:
        encoder_dim: width of the rows that are looked at; 0 has no cross attention.
        dim: of all heads of queries, keys and values together.

    Errors: ValueError when only one of them is 0 or one is negative.
    Source: CogAgent (arXiv 2312.08914).
    """

    encoder_dim: int = 0
    dim: int = 0

    def __post_init__(self) -> None:
        if min(self.encoder_dim, self.dim) < 0 or bool(self.encoder_dim) != bool(self.dim):
            raise ValueError(f"cross.encoder_dim={self.encoder_dim} and cross.dim={self.dim} must both be 0, or above")


def cross_of(module: CrossModuleConfig) -> CrossConfig:
    """Return what a cross module is to the language model."""
    return CrossConfig(module.embed_dim, module.dim) if module.image_size else CrossConfig()


def mrope_section(pairs: int) -> tuple[int, int, int]:
    """Return how GLM-OCR divides a head's turning pairs among time, row and column: 8, 12 and 12 of 32."""
    time = pairs // 4
    row = (pairs - time) // 2
    return time, row, pairs - time - row


@dataclass(frozen=True)
class LanguageShape:
    """What everything around a causal language model knows of it.

    Attributes:
        family: the model_type of transformers.
        vocab_size: V.
        embed_dim: D.
        depth: number of blocks.
        num_heads: H, of the queries.
        num_kv_heads: G, of keys and values; divides H.
        head_dim: K.
        mlp_dim: F, of the MLP, of its gate and of its up projection.
        max_tokens: of a sequence, prompt and answer.
        mrope_section: pairs of channels that turn by time, row and column of a visual token; None where every token
            has one position.
        eos_ids: tokens that end an answer.
        bos_id: the token that begins a text, if any.
        pad_id: the token that fills up finished answers; the first of eos_ids if None.
        mmtp: heads that predict more tokens than the next one.
        expert: projections and MLP of image tokens.
        cross: attention to an image of high resolution.

    Errors: ValueError when a size is not positive or heads do not divide.
    """

    family: str
    vocab_size: int
    embed_dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_tokens: int = 2048
    mrope_section: tuple[int, int, int] | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    mmtp: MmtpConfig = field(default_factory=MmtpConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    cross: CrossConfig = CrossConfig()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_tokens")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")

    @property
    def fill_id(self) -> int:
        """What stands behind the end of an answer that finished before the others of its batch."""
        return self.pad_id if self.pad_id is not None else next(iter(self.eos_ids), 0)


@dataclass(frozen=True)
class LanguageConfig(LanguageShape):
    """Shape and options of a causal decoder that is ours.

    All families have RMSNorm, rotary positions, grouped key-value heads and SwiGLU. `glm` (GLM-4-9B) turns neighboring
    channels of the first part of a head; `glm4` does too, and normalizes what each branch gives before it is added;
    `qwen3` normalizes queries and keys per head.

    Attributes:
        family: llama, glm, glm4 or qwen3.
        eps: of the norms.
        rope_base: of the rotation's angles.
        rope_scaling: of long contexts; None where there is none.
        rotary_fraction: of a head's channels that turn.
        qkv_bias: of the query, key and value projections.
        proj_bias: of the output projection of attention.
        mlp_bias: of the MLP.
        tied: the head is the embedding.
        rope_frequencies: angles of the rotation where a checkpoint stores them, rounded as it may be; those of
            rope_base if None.

    Errors: ValueError when a size is not positive, heads do not divide or an option is unknown.
    """

    family: Family
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    rope_frequencies: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} must be one of {', '.join(FAMILIES)}")
        if not (0.0 < self.eps < math.inf and 0.0 < self.rope_base < math.inf):
            raise ValueError(f"eps={self.eps} and rope_base={self.rope_base} must be positive")
        if not 0.0 < self.rotary_fraction <= 1.0 or self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} must be whole pairs")
        if self.mrope_section is not None and sum(self.mrope_section) != self.rotary_dim // 2:
            raise ValueError(f"mrope_section={self.mrope_section} must add up to {self.rotary_dim // 2} pairs")
        if self.cross.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide cross.dim={self.cross.dim}")
        if self.rope_frequencies is not None and len(self.rope_frequencies) != self.rotary_dim // 2:
            raise ValueError(f"rope_frequencies are {len(self.rope_frequencies)}; expected {self.rotary_dim // 2}")

    def has_expert(self, layer: int) -> bool:
        """Whether a block has a visual expert."""
        return self.expert.every > 0 and layer < self.depth and layer % self.expert.every == 0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def sandwich_norm(self) -> bool:
        """Whether each branch is normalized before it is added."""
        return self.family == "glm4"

    @property
    def interleaved_rotary(self) -> bool:
        """Whether channels (2 i, 2 i + 1) turn together; otherwise (i, i + rotary_dim / 2)."""
        return self.family in ("glm", "glm4")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return self.family == "qwen3"


def check_layout(cfg: LanguageShape, tp: int, pp: int) -> None:
    """Check that a language model can be trained on tp tensor ranks and pp pipeline stages. Errors: ConfigError."""
    if not isinstance(cfg, LanguageConfig):
        if tp > 1:
            raise ConfigError(
                f"--parallel.tp {tp} cannot split a language model of family {cfg.family}, which lies whole on the last"
                f" stage; use --parallel.tp 1, or a model of {', '.join(FAMILIES)}"
            )
        return
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size"):
        if getattr(cfg, name) % tp:
            raise ConfigError(
                f"--parallel.tp {tp} does not divide the language model's {name}={getattr(cfg, name)}; use a divisor of"
                " it"
            )
    if cfg.depth % pp:
        raise ConfigError(
            f"--parallel.pp {pp} does not divide the language model's depth={cfg.depth}; use a divisor of it"
        )
