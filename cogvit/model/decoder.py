"""The block of a causal language model on packed tokens, and the cache of keys and values that generation fills.

Shape letters beyond the project's: S tokens of a pack of sequences, G key-value heads, R pairs of channels that turn,
B rows of a cache, W its width in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.model.attention import Segments, packed_attention
from cogvit.model.blocks import RMSNorm
from cogvit.model.cross import CrossAttention, CrossRows
from cogvit.model.expert import ExpertRows, VisualExpert, routed
from cogvit.model.language_config import LanguageConfig, RopeScaling


def rotary_frequencies(cfg: LanguageConfig, device: torch.device) -> Tensor:
    """Return the angle [R] by which each pair of channels turns from one position to the next, in radians."""
    if cfg.rope_frequencies is not None:
        return torch.tensor(cfg.rope_frequencies, device=device)
    step_R = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float32, device=device) / cfg.rotary_dim
    frequency_R = 1.0 / cfg.rope_base**step_R
    return frequency_R if cfg.rope_scaling is None else _stretched(frequency_R, cfg.rope_scaling)


def _stretched(frequency_R: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule. Source: `_compute_llama3_parameters` of transformers."""
    turns_R = scaling.original_max_tokens * frequency_R / (2 * math.pi)  # within the context of the pretraining
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept_R) * frequency_R / scaling.factor + kept_R * frequency_R


def rotary_1d(position_3S: Tensor, cfg: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [S, R] of each token's rotation.

    Args:
        position_3S: by time, row and column; without `mrope_section` only the first counts.
        cfg: the model's.
    Source: GlmOcrTextRotaryEmbedding of transformers.
    """
    frequency_R = rotary_frequencies(cfg, position_3S.device)
    if cfg.mrope_section is None:
        angle_SR = position_3S[0].float().unsqueeze(1) * frequency_R
    else:
        axis_R = torch.arange(3).repeat_interleave(torch.tensor(cfg.mrope_section)).to(position_3S.device)
        angle_SR = position_3S.float()[axis_R].T * frequency_R
    return angle_SR.cos(), angle_SR.sin()


def turn(x_SHK: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first 2 R channels of every head in fp32 or better; keeps the dtype.

    Pairs are (2 i, 2 i + 1) where interleaved, else (i, i + R).
    """
    cos, sin, width = cos_SR.unsqueeze(1), sin_SR.unsqueeze(1), 2 * cos_SR.shape[-1]
    turned, kept = (x_SHK, None) if width == x_SHK.shape[-1] else x_SHK.split([width, x_SHK.shape[-1] - width], dim=-1)
    turned = turned.to(torch.promote_types(x_SHK.dtype, cos.dtype))
    pair_dim = -1 if interleaved else -2
    # unbind and stack, not slices: the gradient of each is one pass
    a, b = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(pair_dim)
    out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=pair_dim).flatten(-2).to(x_SHK.dtype)
    return out if kept is None else torch.cat([out, kept], dim=-1)


@dataclass(frozen=True)
class CausalLayout:
    """What every block needs beside the hidden states of S tokens.

    Attributes:
        segments: sequences of a pack; None where the tokens are the newest of the rows of the cache.
        cos_SR: of the rotation.
        sin_SR: likewise.
        expert: which tokens go through the visual experts; None where none does.
        cross: what cross attention looks at; None where there is no image.
    """

    segments: Segments | None
    cos_SR: Tensor
    sin_SR: Tensor
    expert: ExpertRows | None = None
    cross: CrossRows | None = None


class KeyValueCache:
    """Keys and values of B sequences of any lengths, each in a row of W places, its newest tokens last.

    Args:
        cfg: the model's.
        length_B: tokens of each prompt.
        width: W, of the longest prompt with its answer.
        like: a tensor on the device and in the dtype of the keys.
    """

    def __init__(self, cfg: LanguageConfig, length_B: tuple[int, ...], width: int, like: Tensor) -> None:
        size = (len(length_B) * width, cfg.num_kv_heads, cfg.head_dim)
        self.key = [like.new_zeros(size) for _ in range(cfg.depth)]
        self.value = [like.new_zeros(size) for _ in range(cfg.depth)]
        self.length_B = torch.tensor(length_B, device=like.device)
        self._rows, self._width, self._longest, self._new = len(length_B), width, max(length_B), 0
        self._ragged = len({*length_B}) > 1
        starts = (torch.arange(n) + row * width for row, n in enumerate(length_B))
        self._place_S = torch.cat([*starts]).to(like.device)

    def append(self, count: int = 1) -> None:
        """Make room for so many more tokens in each row."""
        row_B1 = torch.arange(self._rows, device=self.length_B.device).unsqueeze(1) * self._width
        new = torch.arange(count, device=self.length_B.device)
        self._place_S = (row_B1 + self.length_B.unsqueeze(1) + new).flatten()
        self.length_B = self.length_B + count
        self._longest, self._new = self._longest + count, count

    def take(self, row_B: Tensor) -> None:
        """Make the rows those that are named, in this order; one may be named several times, or left out."""
        width_W = torch.arange(self._width, device=row_B.device)
        place_S = (row_B.unsqueeze(1) * self._width + width_W).flatten()
        self.key = [key[place_S] for key in self.key]
        self.value = [value[place_S] for value in self.value]
        self.length_B = self.length_B[row_B]
        lengths = self.length_B.tolist()
        self._rows, self._longest, self._ragged = len(lengths), max(lengths, default=0), len({*lengths}) > 1

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first so many tokens of the only row."""
        assert self._rows == 1, "rows of several prompts end at different places"
        self.length_B, self._longest = torch.full_like(self.length_B, length), length

    def write(self, layer: int, key_SGK: Tensor, value_SGK: Tensor) -> None:
        """Keep the keys and values of the prompts' tokens, or of the tokens that `append` made room for."""
        self.key[layer].index_copy_(0, self._place_S, key_SGK[: len(self._place_S)])
        self.value[layer].index_copy_(0, self._place_S, value_SGK[: len(self._place_S)])

    def attend(self, layer: int, query_SHK: Tensor) -> Tensor:
        """Return what the newest tokens of each row, row after row, gather from it up to themselves, [S, H, K]."""
        rows = (rearrange(x[layer], "(b w) g k -> b g w k", b=self._rows) for x in (self.key, self.value))
        key, value = (x[:, :, : self._longest] for x in rows)
        query = rearrange(query_SHK, "(b n) h k -> b h n k", b=self._rows)
        mask = None
        if self._ragged or self._new > 1:
            place_W = torch.arange(self._longest, device=query.device)
            seen_BN = self.length_B.unsqueeze(1) - torch.arange(self._new - 1, -1, -1, device=query.device)
            mask = (place_W < seen_BN.unsqueeze(2)).unsqueeze(1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return rearrange(out, "b h n k -> (b n) h k")


class CausalAttention(nn.Module):
    """Attention of each token over its predecessors; G key-value heads serve H query heads.

    The rows of qkv are [q; k; v], of H, G and G heads.
    """

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        self.qkv = nn.Linear(cfg.embed_dim, heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.proj = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.embed_dim, bias=cfg.proj_bias)
        self.q_norm = RMSNorm(cfg.head_dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()

    def forward(
        self,
        x_SD: Tensor,
        layout: CausalLayout,
        layer: int,
        cache: KeyValueCache | None,
        expert: VisualExpert | None = None,
    ) -> Tensor:
        """Return [S, D]; keys and values go into the cache if there is one, image tokens through the expert."""
        cfg, rows = self.cfg, None if expert is None else layout.expert
        qkv = routed(x_SD, rows, self.qkv, None if expert is None else expert.qkv)
        heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        q_SHK, k_SGK, v_SGK = rearrange(qkv, "s (h k) -> s h k", k=cfg.head_dim).split(heads, dim=1)
        q_SHK = turn(self.q_norm(q_SHK), layout.cos_SR, layout.sin_SR, interleaved=cfg.interleaved_rotary)
        k_SGK = turn(self.k_norm(k_SGK), layout.cos_SR, layout.sin_SR, interleaved=cfg.interleaved_rotary)
        # Under autocast the norms give fp32 beside bf16 values.
        q_SHK, k_SGK = q_SHK.to(v_SGK.dtype), k_SGK.to(v_SGK.dtype)
        if cache is not None:
            cache.write(layer, k_SGK, v_SGK)
            if layout.segments is None:
                return self.proj(rearrange(cache.attend(layer, q_SHK), "s h k -> s (h k)"))
        assert layout.segments is not None, "tokens that follow a cache need it"
        out_SHK = packed_attention(q_SHK, k_SGK, v_SGK, layout.segments, causal=True)
        out_SD = rearrange(out_SHK, "s h k -> s (h k)")
        return routed(out_SD, rows, self.proj, None if expert is None else expert.proj)


class GatedMlp(nn.Module):
    """SwiGLU; the rows of fc1 are [gate; up]."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.embed_dim, 2 * cfg.mlp_dim, bias=cfg.mlp_bias)
        self.fc2 = nn.Linear(cfg.mlp_dim, cfg.embed_dim, bias=cfg.mlp_bias)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Return [S, D]."""
        gate_SF, up_SF = self.fc1(x_SD).chunk(2, dim=-1)
        return self.fc2(F.silu(gate_SF) * up_SF)


class DecoderBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); a sandwich norm puts another norm behind each branch.

    Image tokens go through a visual expert where the block has one. Cross attention stands between the two branches.
    """

    def __init__(self, cfg: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = (RMSNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(2))
        self.attn, self.mlp = CausalAttention(cfg), GatedMlp(cfg)
        self.expert = VisualExpert(cfg, GatedMlp(cfg)) if cfg.has_expert(layer) else None
        self.cross = CrossAttention(cfg) if cfg.cross.dim else None
        self.post_norm1 = RMSNorm(cfg.embed_dim, eps=cfg.eps) if cfg.sandwich_norm else nn.Identity()
        self.post_norm2 = RMSNorm(cfg.embed_dim, eps=cfg.eps) if cfg.sandwich_norm else nn.Identity()

    def forward(self, x_SD: Tensor, layout: CausalLayout, cache: KeyValueCache | None = None) -> Tensor:
        """Return the next hidden states, [S, D]."""
        expert = self.expert
        x_SD = x_SD + self.post_norm1(self.attn(self.norm1(x_SD), layout, self.layer, cache, expert))
        if self.cross is not None and layout.cross is not None:
            x_SD = x_SD + self.cross(x_SD, layout.cross, layout.segments, self.layer)
        rows, own_mlp = (None, None) if expert is None else (layout.expert, expert.mlp)
        return x_SD + self.post_norm2(routed(self.norm2(x_SD), rows, self.mlp, own_mlp))
