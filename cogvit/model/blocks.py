"""The transformer block of both towers, on packed tokens.

`cogvit.parallel.trunk` computes the same with Megatron's layers; what the two share by import is attention, rotary
positions and the draws of stochastic depth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvit.draws import uniform
from cogvit.model.attention import packed_attention
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.feedforward import tiled_mlp, tiles
from cogvit.model.position import apply_rotary
from cogvit.model.tokens import PackedLayout, PackedTokens

TowerConfig = CogViTConfig | TextConfig

ATTENTION_BRANCH, MLP_BRANCH = 0, 1
_DROP_PATH_SALT = 0x64726F70  # "drop"


def drop_rate(max_rate: float, layer: int, depth: int) -> float:
    """Return the stochastic-depth rate of a layer: linear from 0 in the first to max_rate in the last."""
    return max_rate * layer / max(depth - 1, 1)


def depth_scale(layout: PackedLayout, rate: float, layer: int, branch: int) -> Tensor:
    """Return the factor [S] of a residual branch: 0 for tokens of dropped images, 1 / (1 - rate) for the others.

    The draw is a hash of the image's key, the layer and the branch: equal on every rank, in every pass and layout.
    Padding has factor 1.
    """
    kept_N = uniform(layout.key_N, _DROP_PATH_SALT, layer, branch) >= rate
    return F.pad(kept_N.float() / (1.0 - rate), (0, 1), value=1.0)[layout.slot_S]


def random_keys(count: int, device: torch.device) -> Tensor:
    """Draw int64 keys [count] from torch's generator, for batches that bring none."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in its weight's dtype: autocast hands over bf16, for which torch has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        return super().forward(x.to(self.weight.dtype))


def make_norm(cfg: TowerConfig, dim: int) -> nn.Module:
    """Return the tower's norm over the last dim."""
    return (RMSNorm if cfg.norm == "rmsnorm" else nn.LayerNorm)(dim, eps=cfg.eps)


def has_norm_after(cfg: TowerConfig) -> bool:
    """Whether a tower's norms stand behind its branches; the text tower's never do."""
    return isinstance(cfg, CogViTConfig) and cfg.norm_after


class Attention(nn.Module):
    """Multi-head attention within each segment, with QK-norm per head (Henry et al. 2020) and rotary positions.

    The rows of qkv are [q; k; v], each (heads, head_dim).
    """

    def __init__(self, cfg: TowerConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim, bias=cfg.qkv_bias)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.proj_bias)
        self.q_norm = make_norm(cfg, cfg.head_dim) if cfg.use_qk_norm else nn.Identity()
        self.k_norm = make_norm(cfg, cfg.head_dim) if cfg.use_qk_norm else nn.Identity()

    def forward(self, x_SD: Tensor, layout: PackedLayout) -> Tensor:
        """Return what each token gathers from its own image, [S, D]."""
        # Unbound as it lies: the gradient of three is then one stack, without a copy.
        q_SHK, k_SHK, v_SHK = rearrange(self.qkv(x_SD), "s (qkv h k) -> s qkv h k", qkv=3, h=self.num_heads).unbind(1)
        q_SHK, k_SHK = self.q_norm(q_SHK), self.k_norm(k_SHK)
        if layout.cos_SK is not None and layout.sin_SK is not None:
            q_SHK = apply_rotary(q_SHK, layout.cos_SK, layout.sin_SK)
            k_SHK = apply_rotary(k_SHK, layout.cos_SK, layout.sin_SK)
        # Under autocast the norms give fp32 beside bf16 values.
        q_SHK, k_SHK = q_SHK.to(v_SHK.dtype), k_SHK.to(v_SHK.dtype)
        out_SHK = packed_attention(q_SHK, k_SHK, v_SHK, layout.segments)
        return self.proj(rearrange(out_SHK, "s h k -> s (h k)"))


class Mlp(nn.Module):
    """Two linear layers with GELU, or SwiGLU whose fc1 rows are [gate; up]."""

    def __init__(self, cfg: TowerConfig) -> None:
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.mlp_dim * (2 if self.gated else 1))
        self.fc2 = nn.Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Return [S, D]."""
        if tiles(x_SD, self.fc1, self.fc2):
            return tiled_mlp(x_SD, self.fc1, self.fc2, gated=self.gated)
        h_SF = self.fc1(x_SD)
        if self.gated:
            gate_SF, up_SF = h_SF.chunk(2, dim=-1)
            return self.fc2(F.silu(gate_SF) * up_SF)
        return self.fc2(F.gelu(h_SF))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x_SD: Tensor) -> Tensor:
        """Scale the last dim."""
        return x_SD * self.gamma


class Block(nn.Module):
    """x + drop(ls1(attn(norm1(x)))), then x + drop(ls2(mlp(norm2(x)))).

    With norm_after it is norm1(attn(x)) and norm2(mlp(x)).
    """

    def __init__(self, cfg: TowerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.norm_after = layer, has_norm_after(cfg)
        self.drop_rate = drop_rate(cfg.drop_path_rate, layer, cfg.depth)
        self.norm1 = make_norm(cfg, cfg.embed_dim)
        self.attn = Attention(cfg)
        self.norm2 = make_norm(cfg, cfg.embed_dim)
        self.mlp = Mlp(cfg)
        scale = cfg.layer_scale_init
        self.ls1 = nn.Identity() if scale is None else LayerScale(cfg.embed_dim, scale)
        self.ls2 = nn.Identity() if scale is None else LayerScale(cfg.embed_dim, scale)

    def forward(self, x_SD: Tensor, layout: PackedLayout) -> Tensor:
        """Return the next hidden states, [S, D]."""
        seen_SD = self.norm1(self.attn(x_SD, layout)) if self.norm_after else self.attn(self.norm1(x_SD), layout)
        x_SD = x_SD + self._drop(self.ls1(seen_SD), layout, ATTENTION_BRANCH)
        made_SD = self.norm2(self.mlp(x_SD)) if self.norm_after else self.mlp(self.norm2(x_SD))
        return x_SD + self._drop(self.ls2(made_SD), layout, MLP_BRANCH)

    def _drop(self, branch_SD: Tensor, layout: PackedLayout, branch: int) -> Tensor:
        if not self.training or self.drop_rate == 0.0:
            return branch_SD
        scale_S = depth_scale(layout, self.drop_rate, self.layer, branch)
        return branch_SD * scale_S.unsqueeze(1).to(branch_SD.dtype)


def run_blocks(blocks: Iterable[nn.Module], tokens: PackedTokens, recompute: bool) -> Tensor:
    """Return the hidden states [S, D] after all blocks.

    Args:
        blocks: the tower's.
        tokens: what enters the first.
        recompute: keep only each block's input and compute the rest again in backward.
    """
    x_SD = tokens.x_SD
    for block in blocks:
        x_SD = checkpoint(block, x_SD, tokens, use_reentrant=False) if recompute else block(x_SD, tokens)
    return x_SD
