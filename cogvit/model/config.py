"""Shapes and options of the vision and text towers, and of the adapter to a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Size = Literal["tiny", "small", "base", "large", "so400m"]

# Width, depth, heads and hidden width of the MLP. Source: ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021) for
# tiny and small, SoViT-400m/14 (Alabdulmohsin et al. 2023).
SHAPES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
}


@dataclass
class CogViTConfig:
    """Shape and options of the vision encoder.

    Names and defaults up to eps are those of the reference build; the last four choose the family of the blocks:
    `reference` is the defaults, `cogvit_l` is rmsnorm + swiglu + rotary without CLS, the layout of GLM-OCR.

    Attributes:
        image_size: side of the square image that the learned position table is sized for, px.
        patch_size: P, px.
        in_chans: C of the images.
        embed_dim: D.
        depth: number of blocks.
        num_heads: of attention.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: of the query, key and value projection.
        proj_bias: of the output projection of attention.
        use_qk_norm: normalize queries and keys per head.
        use_cls_token: put a learned token before each image's patches.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 in the first.
        layer_scale_init: start of a learned factor per channel of each residual branch; none of them if None.
        naflex_max_tokens: patches of the largest image; what users give to `naflex_pack`.
        eps: of the norms.
        norm: of blocks, QK-norm and the final norm.
        mlp: gelu has two matrices, swiglu three.
        position: 2-D table added to the tokens, or 2-D rotation of queries and keys.
        norm_after: normalize what each branch gives instead of what it takes, with no norm at the end, as EVA2-CLIP-E.

    Errors: ValueError when a size is not positive, the heads do not divide the width or an option is unknown.
    """

    image_size: int = 224
    patch_size: int = 14
    in_chans: int = 3
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    use_qk_norm: bool = True
    use_cls_token: bool = True
    drop_path_rate: float = 0.0
    layer_scale_init: float | None = None
    naflex_max_tokens: int = 1024
    eps: float = 1e-6

    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    position: Literal["learned", "rotary"] = "learned"
    norm_after: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "naflex_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        _check_blocks(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.position == "rotary" and self.head_dim % 4:
            raise ValueError(f"2-D rotary positions need a head_dim that 4 divides, not {self.head_dim}")
        if self.position not in ("learned", "rotary"):
            raise ValueError(f"position={self.position!r} must be one of learned, rotary")

    @property
    def head_dim(self) -> int:
        """K, channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def base_grid(self) -> tuple[int, int]:
        """Patches of the square image: rows, columns."""
        side_patches = self.image_size // self.patch_size
        return side_patches, side_patches

    @property
    def mlp_dim(self) -> int:
        """F, hidden width of the MLP (of one of the two branches for swiglu)."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass
class TextConfig:
    """Shape of the text tower: the vision tower's blocks over a token embedding with learned 1-D positions.

    What is not listed means the same as in `CogViTConfig`.

    Attributes:
        vocab_size: number of token ids; the default is ByT5Tokenizer's, 256 bytes, 3 specials and 125 sentinels.
        max_tokens: of a caption; the data plane truncates longer ones.

    Errors: ValueError when a size is not positive, the heads do not divide the width or an option is unknown.
    """

    vocab_size: int = 384
    max_tokens: int = 64
    embed_dim: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    use_qk_norm: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    drop_path_rate: float = 0.0
    layer_scale_init: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_tokens", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        _check_blocks(self)

    @property
    def head_dim(self) -> int:
        """K, channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """F, hidden width of the MLP (of one of the two branches for swiglu)."""
        return int(self.embed_dim * self.mlp_ratio)


AdapterKind = Literal["mlp", "glm", "swiglu", "conv", "wide_conv"]


@dataclass(frozen=True)
class AdapterConfig:
    """What stands between the vision tower and a language model.

    Attributes:
        kind: mlp is two layers over merged patches, glm the merger of GLM-OCR, swiglu the projection of CogVLM, conv
            that of CogVLM2, wide_conv that of GLM-4V-9B.
        hidden_dim: of the adapter's MLP; each kind's own multiple of the language model's width if None.
        spatial_pool: s; s x s neighboring patches become one token of the language model.

    Errors: ValueError when the kind is unknown or a size is below 1.
    """

    kind: AdapterKind = "glm"
    hidden_dim: int | None = None
    spatial_pool: int = 2

    def __post_init__(self) -> None:
        if self.kind not in get_args(AdapterKind):
            raise ValueError(f"kind={self.kind!r} of the adapter must be one of {', '.join(get_args(AdapterKind))}")
        if self.spatial_pool < 1 or (self.hidden_dim is not None and self.hidden_dim < 1):
            raise ValueError(f"spatial_pool={self.spatial_pool} and hidden_dim={self.hidden_dim} must be at least 1")


def _check_blocks(cfg: CogViTConfig | TextConfig) -> None:
    """Check what the towers have in common, whose sizes are known to be positive."""
    if not (0.0 < cfg.eps < math.inf and 0.0 < cfg.mlp_ratio < math.inf and cfg.mlp_dim >= 1):
        raise ValueError(f"eps={cfg.eps} and mlp_ratio={cfg.mlp_ratio} must be positive")
    if cfg.embed_dim % cfg.num_heads:
        raise ValueError(f"num_heads={cfg.num_heads} does not divide embed_dim={cfg.embed_dim}")
    if not 0.0 <= cfg.drop_path_rate < 1.0:
        raise ValueError(f"drop_path_rate={cfg.drop_path_rate} must be in [0, 1)")
    if cfg.layer_scale_init is not None and not math.isfinite(cfg.layer_scale_init):
        raise ValueError(f"layer_scale_init={cfg.layer_scale_init} must be finite")
    for name, legal in (("norm", ("layernorm", "rmsnorm")), ("mlp", ("gelu", "swiglu"))):
        if getattr(cfg, name) not in legal:
            raise ValueError(f"{name}={getattr(cfg, name)!r} must be one of {', '.join(legal)}")


SeenAtImages = Literal["embeddings", "masked", "token", "token_path", "tokens"]
SEEN_AT_IMAGES: tuple[SeenAtImages, ...] = ("embeddings", "masked", "token", "token_path", "tokens")


@dataclass(frozen=True)
class MmtpConfig:
    """Heads behind the last block, which predict the tokens after the next one.

    Attributes:
        depths: M, how many tokens after the next one are predicted; 0 has no heads.
        share: one layer serves all depths.
        images: what the heads see where an image stands: its `embeddings`, nothing (`masked`: its tokens are left out
            of their sequence), the image `token`'s embedding, that without the predictions whose path crosses an image
            (`token_path`), or a learned set of `tokens`, chosen by the place inside the image.
        tokens: K, size of that set.
        weight: of the mean of the depths' losses beside the loss of the next token.
        trunk_gradient: the heads' loss reaches the blocks before them.

    Errors: ValueError when a number is out of range or `images` is unknown.
    Source: GLM-5V-Turbo's report, section 2.2 (its options 1, 2 and 3); the weight is DeepSeek-V3's.
    """

    depths: int = 0
    share: bool = True
    images: SeenAtImages = "token"
    tokens: int = 4
    weight: float = 0.3
    trunk_gradient: bool = True

    def __post_init__(self) -> None:
        if self.depths < 0 or self.tokens < 1:
            raise ValueError(f"mmtp.depths={self.depths} must be at least 0 and mmtp.tokens={self.tokens} at least 1")
        if self.images not in SEEN_AT_IMAGES:
            raise ValueError(f"mmtp.images={self.images!r} must be one of {', '.join(SEEN_AT_IMAGES)}")
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"mmtp.weight={self.weight} must be 0 or above")

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""
        return min(self.depths, 1) if self.share else self.depths


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video are shown.

    Attributes:
        frames: the most of a video; they are spread evenly from the first to the last unless `every_s` says otherwise.
        every_s: seconds from one to the next; 0 spreads them evenly.
        first_s: what comes after so many seconds is not looked at; 0 looks at all.
        times: the time of each frame stands before it as text.

    Errors: ValueError when a number is out of range.
    """

    frames: int = 24
    every_s: float = 0.0
    first_s: float = 60.0
    times: bool = True

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"video.frames={self.frames} must be at least 1")
        for name, least in (("every_s", 0.001), ("first_s", 0.001)):
            value = getattr(self, name)
            if value != 0.0 and not least <= value < math.inf:
                raise ValueError(f"video.{name}={value} must be 0, or {least} or above")


@dataclass(frozen=True)
class CrossModuleConfig:
    """A second encoder that sees each image at high resolution, and cross attention of every block to what it gives.

    All defaults but the first are those of the released EVA2-CLIP-L, which sees 1120 px.

    Attributes:
        image_size: side of the squares that images are shown as, px; 0 has no such module.
        patch_size: P of the encoder, px.
        embed_dim: C, its width.
        depth: its blocks.
        num_heads: of its attention.
        mlp_dim: of its MLP.
        dim: of all heads of cross attention together, which are as many as the language model's.

    Errors: ValueError when a size is not positive or does not divide.
    Source: CogAgent (arXiv 2312.08914).
    """

    image_size: int = 0
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 23
    num_heads: int = 16
    mlp_dim: int = 2730
    dim: int = 1024

    def __post_init__(self) -> None:
        if self.image_size < 0:
            raise ValueError(f"cross.image_size={self.image_size} must be 0 (none) or above")
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"cross.{name}={getattr(self, name)} must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"cross.patch_size={self.patch_size} does not divide cross.image_size={self.image_size}; use a multiple"
                " of it"
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"cross.num_heads={self.num_heads} must divide cross.embed_dim={self.embed_dim} into heads of which 4"
                " divides the channels"
            )

    @property
    def rows_per_image(self) -> int:
        """What cross attention sees of an image: its patches."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ExpertConfig:
    """A visual expert: projections of attention and an MLP of their own for image tokens.

    Attributes:
        every: n; blocks 0, n, 2 n and so on have one; 0 has none.
        qkv_bias: of the expert's query, key and value projections, whatever the language model's have.

    Errors: ValueError when every is negative.
    Source: CogVLM (arXiv 2311.03079); its biases are CogVLM2's.
    """

    every: int = 0
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"expert.every={self.every} must be 0 (none) or above")
