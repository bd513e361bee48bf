"""What lies between a layer's matrix products: norms, activations and residual branches, element by element.

Under autocast they take and give its dtype, except for the residual stream, which stays as it is (fp32).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products on a tensor: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalize the last dim in the weight's dtype (RMS norm without a bias, else layer norm) and cast the result."""
    x = x.to(weight.dtype)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


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
