"""Attention inside each segment of a packed row, without padding and without a mask.

What lives here: the segments of a pack and the attention over them, for every device. It has no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.batch import HostView


@dataclass(frozen=True)
class Segments:
    """Where each image or caption lies in a packed row; built once a pass, so no layer waits for the device."""

    cu_seqlens: Tensor  # [num_valid + 2] int32; the last segment is padding
    lengths: tuple[int, ...]  # of all segments, in tokens
    num_valid: int  # leading segments that are attended; the padding's output is zero

    @property
    def num_valid_tokens(self) -> int:
        """Tokens before the padding."""
        return sum(self.lengths[: self.num_valid])

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Neighbors of equal length, which share one batch: segments and tokens of each."""
        valid = self.lengths[: self.num_valid]
        return tuple((len(list(run)), length) for length, run in groupby(valid) if length)


def segments_of(cu_seqlens: Tensor, host: HostView | None = None) -> Segments:
    """Build segments from cumulative lengths [S + 1] whose last segment is padding.

    host: what the host knows of the same pack; without it this waits for the device.
    """
    lengths = tuple(stop - start for start, stop in pairwise(cu_seqlens.tolist())) if host is None else host.lengths
    return Segments(cu_seqlens, lengths, len(lengths) - 1)


def varlen_kernel_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention takes a pack as it lies; what it refuses is batched by length.

    Source: `mha_varlen_fwd` of torch, the kernel under `varlen_attn`.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256


def packed_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, *, causal: bool = False
) -> Tensor:
    """Softmax attention of every token over its own segment, scaled by K ** -0.5; [T, H, K] out.

    The padding's output is zero; a pack that is all padding gives zeros that still carry zero gradients to q, k and v.

    Args:
        q_THK: queries.
        k_TGK: keys; where G is less than H, each head of them serves H / G neighboring heads of queries.
        v_TGK: values.
        segments: of the T tokens.
        causal: a token sees itself and those before it.

    Errors: ValueError when the shapes differ or are not those of the segments.
    """
    num_tokens = sum(segments.lengths)
    tokens, heads, head_dim = q_THK.shape
    if k_TGK.shape != v_TGK.shape or (len(k_TGK), k_TGK.shape[2]) != (tokens, head_dim) or tokens != num_tokens:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_THK, k_TGK, v_TGK))
        raise ValueError(f"q, k and v have shapes {shapes}; expected three of ({num_tokens}, heads, head_dim)")
    if heads % k_TGK.shape[1]:
        raise ValueError(f"{k_TGK.shape[1]} heads of keys and values do not divide {heads} of queries")
    if not segments.num_valid_tokens:
        return (q_THK + (k_TGK + v_TGK).repeat_interleave(heads // k_TGK.shape[1], 1)) * 0.0
    if varlen_kernel_takes(q_THK.device, q_THK.dtype, head_dim):
        return _varlen_attention(q_THK, k_TGK, v_TGK, segments, causal)
    return _batched_attention(q_THK, k_TGK, v_TGK, segments, causal)


def _batched_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, causal: bool) -> Tensor:
    padding = len(q_THK) - segments.num_valid_tokens
    sizes = [count * length for count, length in segments.runs] + [padding]
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    outputs = []
    # split, not slices: its gradient is one concatenation
    for (count, length), *parts in zip(
        segments.runs, *(x.split(sizes)[:-1] for x in (q_THK, k_TGK, v_TGK)), strict=True
    ):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if padding:
        outputs.append(outputs[0].new_zeros(padding, *outputs[0].shape[1:]))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _varlen_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # it imports torch's compiler: 2 s that only CUDA users pay

    valid, longest = segments.num_valid_tokens, max(segments.lengths[: segments.num_valid])
    bounds = segments.cu_seqlens[: segments.num_valid + 1]
    q, k, v = (x[:valid] for x in (q_THK, k_TGK, v_TGK))
    window, grouped = (-1, 0 if causal else -1), q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return F.pad(out, (0, 0, 0, 0, 0, len(q_THK) - valid))
