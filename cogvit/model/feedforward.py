"""The MLP of a block in tiles of tokens, for training on CPU: less memory and fewer touched pages than layer by layer.

What lives here: the tiles' forward and backward. `cogvit.model.blocks.Mlp` has the parameters.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# A tile's hidden activations (6 MB at 3072 channels in fp32) stay under the size from which malloc maps and unmaps
# every tensor anew, and the matrix products of a tile are still as fast as those of the whole.
TILE_TOKENS = 512


class LinearWeights(Protocol):
    """A linear layer of any library."""

    @property
    def weight(self) -> Tensor:
        """[out, in]."""

    @property
    def bias(self) -> Tensor | None:
        """[out], if it has one."""


def tiles(x_SD: Tensor, fc1: torch.nn.Linear, fc2: torch.nn.Linear) -> bool:
    """Whether `tiled_mlp` gives what calling the layers one by one gives, and is worth it: training, on CPU.

    It is not where a layer was replaced (adapters, quantization), has hooks (pruning, recorders of activations) or is
    frozen, whose weight gradients nobody needs.
    """
    return x_SD.ndim == 2 and trains_on_cpu(x_SD) and _is_plain(fc1) and _is_plain(fc2)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether a tensor's gradient is wanted, on CPU."""
    return x.device.type == "cpu" and x.requires_grad


def _is_plain(layer: torch.nn.Linear) -> bool:
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is torch.nn.Linear and layer.weight.requires_grad and not any(hooks)


def tiled_mlp(x_SD: Tensor, fc1: LinearWeights, fc2: LinearWeights, *, gated: bool) -> Tensor:
    """Return fc2(GELU(fc1(x))) or, gated, fc2(SiLU(gate) * up) with [gate; up] = fc1(x); [S, D] in and out.

    Keeps the input and what fc1 gives; the activation is computed again in backward. Gradients of the weights are
    summed over tiles in fp32 or better, under autocast and in half-precision models too. Differentiable once.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_SD.dtype
    outputs: tuple[Tensor, ...] = _TiledMlp.apply(  # type: ignore[no-untyped-call]
        x_SD.to(dtype), fc1.weight, fc1.bias, fc2.weight, fc2.bias, gated
    )
    return outputs[0]


class _TiledMlp(torch.autograd.Function):
    """Both linear layers and the activation between them; computes in the input's dtype.

    What fc1 gives, tile by tile, is among the outputs because that is how torch.func lets a function keep it.
    """

    @staticmethod
    def forward(
        x_SD: Tensor, w1_FD: Tensor, b1_F: Tensor | None, w2_DF: Tensor, b2_D: Tensor | None, gated: bool
    ) -> tuple[Tensor, ...]:
        up, down = w1_FD.t().to(x_SD.dtype), w2_DF.t().to(x_SD.dtype)
        bias1, bias2 = (None if bias is None else bias.to(x_SD.dtype) for bias in (b1_F, b2_D))
        out_SD = torch.empty_like(x_SD)
        hidden = []
        for x, out in zip(x_SD.split(TILE_TOKENS), out_SD.split(TILE_TOKENS), strict=True):
            h = _product(x, up, bias1)
            _product(_activate(h, gated), down, bias2, out)
            hidden.append(h)
        return out_SD, *hidden

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x_SD, w1_FD, _, w2_DF, _, gated = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_SD, w1_FD, w2_DF, *output[1:])
        ctx.gated = gated  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_SD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_SD is None:
            return (None,) * 6
        x_SD, w1_FD, w2_DF, *hidden = ctx.saved_tensors  # type: ignore[attr-defined]
        up, down = w1_FD.to(x_SD.dtype), w2_DF.to(x_SD.dtype)
        total = torch.promote_types(w1_FD.dtype, torch.float32)
        grad_w1, grad_w2 = torch.zeros_like(w1_FD, dtype=total), torch.zeros_like(w2_DF, dtype=total)
        of_bias1, of_bias2 = ctx.needs_input_grad[2], ctx.needs_input_grad[4]  # type: ignore[attr-defined]
        grad_b1 = torch.zeros_like(w1_FD[:, 0], dtype=total) if of_bias1 else None
        grad_b2 = grad_SD.sum(0, dtype=total) if of_bias2 else None
        grad_x_SD = torch.empty_like(x_SD)
        tiles = (x.split(TILE_TOKENS) for x in (x_SD, grad_SD, grad_x_SD))
        for x, grad, grad_x, h in zip(*tiles, hidden, strict=True):
            _add_product(grad_w2, grad.t(), _activate(h, ctx.gated))  # type: ignore[attr-defined]
            grad_h = _activation_gradient(grad @ down, h, ctx.gated)  # type: ignore[attr-defined]
            _add_product(grad_w1, grad_h.t(), x)
            if grad_b1 is not None:
                grad_b1 += grad_h.sum(0, dtype=total)
            torch.mm(grad_h, up, out=grad_x)
        grads = (grad_w1, grad_b1, grad_w2, grad_b2)
        return grad_x_SD, *(None if grad is None else grad.to(w1_FD.dtype) for grad in grads), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def _activate(h: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activation_gradient(grad: Tensor, h: Tensor, gated: bool) -> Tensor:
    """Return the gradient of h, from that of what `_activate` gives."""
    if not gated:
        return torch.ops.aten.gelu_backward(grad, h)
    gate, up = h.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad.mul_(F.silu(gate))], dim=-1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total; in half precision the product is rounded, the sum is not."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
