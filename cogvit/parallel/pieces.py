"""What lies between a layer's matrix products: norms, rotations, activations and residual branches.

Under autocast they take and give its dtype, except for the residual stream, which stays as it is (fp32). Each is a few
passes over memory; compiled (`FusedPieces`) it is one, which also keeps no more than its inputs for backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogvit.model.position import apply_rotary

Fusion = Literal["auto", "on", "off"]
Weights = tuple[Tensor, Tensor | None]  # of a norm: weight, and bias of a layer norm
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]  # heads, cosines, sines

_SHAPES = 64
log = logging.getLogger(__name__)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products on a tensor: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def normalized(x: Tensor, weights: Weights, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalize the last dim in the weight's dtype (RMS norm without a bias, else layer norm) and cast the result."""
    weight, bias = weights
    x = x.to(weight.dtype)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


def heads(
    q_SHK: Tensor,
    k_SHK: Tensor,
    norms: tuple[Weights, Weights] | None,
    angles: tuple[Tensor, Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    rotate: Rotation = apply_rotary,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys after QK-norm and rotation, where there are any.

    angles: fp32 cosines and sines as `rotate` takes them, by default [S, K].
    """
    if norms is not None:
        q_SHK, k_SHK = normalized(q_SHK, norms[0], eps, dtype), normalized(k_SHK, norms[1], eps, dtype)
    if angles is not None:
        q_SHK, k_SHK = rotate(q_SHK, *angles), rotate(k_SHK, *angles)
    return q_SHK, k_SHK


def lean_heads(
    q_SHK: Tensor,
    k_SHK: Tensor,
    norms: tuple[Weights, Weights] | None,
    angles: tuple[Tensor, Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    rotate: Rotation = apply_rotary,
) -> tuple[Tensor, Tensor]:
    """Do what `heads` does; of half-precision queries and keys no fp32 copies are kept, which norms would."""
    inputs = (q_SHK, k_SHK, norms, angles, eps, dtype, rotate)
    if norms is None or q_SHK.dtype == norms[0][0].dtype or not torch.is_grad_enabled():
        return heads(*inputs)
    turned: tuple[Tensor, Tensor] = checkpoint(heads, *inputs, use_reentrant=False, preserve_rng_state=False)
    return turned


def activated(h_F: Tensor, bias_F: Tensor | None, *, gated: bool) -> Tensor:
    """Return GELU(h + bias) or, gated, SiLU(gate) * up with [gate; up] = h + bias; [..., F] in."""
    if bias_F is not None:
        h_F = h_F + bias_F.to(h_F.dtype)
    if not gated:
        return F.gelu(h_F)
    gate, up = h_F.chunk(2, dim=-1)
    return F.silu(gate) * up


def with_branch(
    residual_S1D: Tensor, x_S1D: Tensor, bias_D: Tensor | None, gamma_D: Tensor | None, scale_S: Tensor | None
) -> Tensor:
    """Return residual + (x + bias) * gamma * scale: a layer's bias, LayerScale and stochastic depth, where they are."""
    if bias_D is not None:
        x_S1D = x_S1D + bias_D.to(x_S1D.dtype)
    if gamma_D is not None:
        x_S1D = x_S1D * gamma_D.to(x_S1D.dtype)
    if scale_S is not None:
        x_S1D = x_S1D * scale_S[:, None, None].to(x_S1D.dtype)
    return residual_S1D + x_S1D


@dataclass(frozen=True)
class Pieces:
    """What stands above, plain or compiled."""

    normalized: Callable[..., Tensor] = normalized
    heads: Callable[..., tuple[Tensor, Tensor]] = lean_heads
    activated: Callable[..., Tensor] = activated
    with_branch: Callable[..., Tensor] = with_branch


def pieces_on(device: torch.device, fusion: Fusion) -> Pieces:
    """Return the pieces for a device: compiled where that is asked for, and by default on CUDA."""
    return fused_pieces() if fusion == "on" or (fusion == "auto" and device.type == "cuda") else Pieces()


@cache
def fused_pieces() -> Pieces:
    """Return compiled pieces, the same for all towers; they compile when they meet a new shape."""
    compiler = _Compiler()
    return Pieces(*(compiler.compiled(piece) for piece in (normalized, heads, activated, with_branch)))


class _Compiler:
    """Compiles functions until one cannot be; from then on all run as they stand, which is slower and as right."""

    def __init__(self) -> None:
        self._works = True

    def compiled(self, piece: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException  # 2 s, and only where something is compiled

        # Shapes are those of the towers, with and without gradients: few, and each is worth kernels of its own.
        run = torch.compile(piece, dynamic=False, fullgraph=True, recompile_limit=_SHAPES)  # type: ignore[call-overload]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._works:
                try:
                    return run(*args, **kwargs)
                except TorchDynamoException as error:
                    self._works = False
                    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
                    log.warning("torch.compile failed, --fusion is off: %s", reason)
            return piece(*args, **kwargs)

        return call
