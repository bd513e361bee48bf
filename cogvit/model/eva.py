"""EVA2-CLIP, the encoders of the CogVLM family: E, which is post-norm, and L, which CogAgent looks through.

Images are squares of one size, so that a pack is a dense batch. Both have a CLS token and a learned table of positions,
neither has a final norm, and the last block of the published encoders is not run.

Source: visual.py and cross_visual.py of the released CogVLM, CogVLM2 and CogAgent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.batch import PackedImages
from cogvit.model.config import CrossModuleConfig
from cogvit.model.init import init_model
from cogvit.model.tokens import PackedFeatures

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_PRETRAINED_GRID = 16  # patches a side at 224 px, over which L's rotation was trained
_ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class EvaConfig:
    """Shape of an EVA2-CLIP encoder.

    Attributes:
        variant: e is post-norm with GELU; l is pre-norm with SwiGLU, a norm inside each branch, rotary positions
            besides the learned ones, and no bias for keys.
        image_size: side of the images, px.
        patch_size: P, px.
        embed_dim: D.
        depth: blocks that are run.
        num_heads: of attention.
        mlp_dim: F.
        eps: of the norms.
        output_position: add a learned position to what comes out.

    Errors: ValueError when a size is not positive or does not divide.
    """

    variant: Literal["e", "l"]
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    eps: float = 1e-6
    output_position: bool = False
    in_chans: int = 3

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise ValueError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}, and num_heads={self.num_heads}"
                f" embed_dim={self.embed_dim}"
            )
        if self.variant == "l" and self.head_dim % 4:
            raise ValueError(f"2-D rotary positions need a head_dim that 4 divides, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """K, channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def side_patches(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


class _AttentionE(nn.Module):
    """The rows of qkv are [q; k; v]."""

    def __init__(self, cfg: EvaConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x_NSD: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_NSD), "n s (three h k) -> three n h s k", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h s k -> n s (h k)"))


class BlockE(nn.Module):
    """x + norm1(attn(x)), then x + norm2(mlp(x))."""

    def __init__(self, cfg: EvaConfig) -> None:
        super().__init__()
        self.attn = _AttentionE(cfg)
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(cfg.embed_dim, cfg.mlp_dim), nn.Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x_NSD: Tensor, cos_TK: Tensor | None, sin_TK: Tensor | None) -> Tensor:
        """Return the next hidden states [N, S, D]; E has no rotation."""
        x_NSD = x_NSD + self.norm1(self.attn(x_NSD))
        return x_NSD + self.norm2(self.fc2(F.gelu(self.fc1(x_NSD))))


class _AttentionL(nn.Module):
    """The rows of qkv are [q; k; v]; keys have no bias."""

    def __init__(self, cfg: EvaConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(cfg.embed_dim)) for _ in range(2))
        self.norm = nn.LayerNorm(cfg.embed_dim, eps=cfg.eps)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x_NSD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_NSD, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "n s (three h k) -> three n h s k", three=3, h=self.num_heads)
        q, k = (_turn_patches(x, cos_TK, sin_TK).to(v.dtype) for x in (q, k))
        return self.proj(self.norm(rearrange(F.scaled_dot_product_attention(q, k, v), "n h s k -> n s (h k)")))


class BlockL(nn.Module):
    """x + attn(norm1(x)), then x + SwiGLU(norm2(x)), whose fc1 rows are [gate; up]."""

    def __init__(self, cfg: EvaConfig) -> None:
        super().__init__()
        self.attn = _AttentionL(cfg)
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(2))
        self.mlp_norm = nn.LayerNorm(cfg.mlp_dim, eps=cfg.eps)
        self.fc1, self.fc2 = nn.Linear(cfg.embed_dim, 2 * cfg.mlp_dim), nn.Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x_NSD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Return the next hidden states [N, S, D]."""
        x_NSD = x_NSD + self.attn(self.norm1(x_NSD), cos_TK, sin_TK)
        gate, up = self.fc1(self.norm2(x_NSD)).chunk(2, dim=-1)
        return x_NSD + self.fc2(self.mlp_norm(F.silu(gate) * up))


class EvaEncoder(nn.Module):
    """An EVA2-CLIP encoder of square images.

    Attributes:
        cfg: its shape.
        cos_TK: of L's rotation, [T, K]; None for E.
        sin_TK: likewise.
        recompute: set it to compute each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: EvaConfig) -> None:
        """Build an encoder with new weights, which follow torch's default generator."""
        super().__init__()
        self.cfg, self.recompute = cfg, False
        tokens = cfg.side_patches**2
        self.patch_embed = nn.Conv2d(cfg.in_chans, cfg.embed_dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, cfg.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(tokens + 1, cfg.embed_dim))
        self.blocks = nn.ModuleList((BlockE if cfg.variant == "e" else BlockL)(cfg) for _ in range(cfg.depth))
        self.out_pos_embed = nn.Parameter(torch.zeros(tokens, cfg.embed_dim)) if cfg.output_position else None
        cos_TK, sin_TK = rotation(cfg) if cfg.variant == "l" else (None, None)
        self.register_buffer("cos_TK", cos_TK)
        self.register_buffer("sin_TK", sin_TK)
        init_model(self, int(torch.randint(2**62, (), device="cpu")))

    def forward_packed(self, images: PackedImages) -> PackedFeatures:
        """Encode a pack; its features are those of its images one by one.

        Errors: ValueError when an image has another size than the encoder's.
        """
        side, grids = self.cfg.side_patches, images.grid_hw.tolist()
        present = [grid for grid in grids if grid != [0, 0]]
        if any(grid != [side, side] for grid in present):
            raise ValueError(f"images have {present} patches; this encoder takes squares of {side} x {side}")
        count = len(present)
        patches = images.patches[: count * side**2].unflatten(0, (count, side**2))
        patch_TD = self(patches).flatten(0, 1)
        return PackedFeatures(F.pad(patch_TD, (0, 0, 0, len(images.patches) - len(patch_TD))), None)

    def forward(self, patches_NTE: Tensor) -> Tensor:
        """Return the features [N, T, D] of images' patches [N, T, 3 * P * P]: uint8, or floats as CLIP normalizes."""
        x = patches_NTE.to(self.patch_embed.weight.dtype)
        if patches_NTE.dtype == torch.uint8:
            x = self._normalized(patches_NTE).to(x.dtype)
        x = F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        angles, again = (self.cos_TK, self.sin_TK), self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, *angles, use_reentrant=False) if again else block(x, *angles)
        return x[:, 1:] if self.out_pos_embed is None else x[:, 1:] + self.out_pos_embed

    def _normalized(self, patches_NTE: Tensor) -> Tensor:
        mean, deviation = (
            torch.tensor(values, device=patches_NTE.device).repeat_interleave(self.cfg.patch_size**2)
            for values in (MEAN, DEVIATION)
        )
        return (patches_NTE.float() / 255.0 - mean) / deviation


def second_encoder(module: CrossModuleConfig) -> EvaConfig:
    """Return the shape of a cross module's encoder."""
    return EvaConfig(
        "l",
        module.image_size,
        module.patch_size,
        module.embed_dim,
        module.depth,
        module.num_heads,
        module.mlp_dim,
        output_position=True,
    )


def cross_module(encoder: EvaConfig, dim: int) -> CrossModuleConfig:
    """Return the cross module of a second encoder and of cross attention of so many channels."""
    return CrossModuleConfig(
        encoder.image_size,
        encoder.patch_size,
        encoder.embed_dim,
        encoder.depth,
        encoder.num_heads,
        encoder.mlp_dim,
        dim,
    )


def rotation(cfg: EvaConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, K] of L's rotation: the first half of a head turns by row, the second by column.

    Places are stretched to the grid of the pretraining.
    """
    half = cfg.head_dim // 2
    frequency_F = 1.0 / _ROTARY_BASE ** (torch.arange(0, half, 2).float() / half)
    place = torch.arange(cfg.side_patches) / cfg.side_patches * _PRETRAINED_GRID
    angle = repeat(place[:, None] * frequency_F, "side f -> side (f pair)", pair=2)
    rows = repeat(angle, "side k -> side columns k", columns=cfg.side_patches)
    columns = repeat(angle, "side k -> rows side k", rows=cfg.side_patches)
    angle_TK = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return angle_TK.cos(), angle_TK.sin()


def _turn_patches(x_NHSK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate channels (2 i, 2 i + 1) of all tokens but the first, which is CLS."""
    cls, patches = x_NHSK.split([1, x_NHSK.shape[2] - 1], dim=2)
    a, b = patches[..., 0::2], patches[..., 1::2]
    crossed = torch.stack([-b, a], dim=-1).flatten(-2)
    return torch.cat([cls, (patches * cos_TK + crossed * sin_TK).to(cls.dtype)], dim=2)
