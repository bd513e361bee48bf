"""The MLP in tiles of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.model.feedforward import TILE_TOKENS, tiled_mlp


def layers(gated: bool, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(6, 16 if gated else 8, dtype=dtype), nn.Linear(8, 6, dtype=dtype)


def layer_by_layer(x: Tensor, fc1: nn.Linear, fc2: nn.Linear, gated: bool) -> Tensor:
    h = fc1(x)
    return fc2(F.silu(h[:, :8]) * h[:, 8:] if gated else F.gelu(h))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, TILE_TOKENS, 2 * TILE_TOKENS + 7])
def test_equals_layer_by_layer_with_every_gradient(num_tokens: int, gated: bool) -> None:
    fc1, fc2 = layers(gated, torch.float64)
    x = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    out, expected = tiled_mlp(x, fc1, fc2, gated=gated), layer_by_layer(x, fc1, fc2, gated)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("gated", [False, True])
def test_sums_gradients_in_fp32_under_autocast(gated: bool) -> None:
    """64 tiles: a sum that is rounded to bf16 each time would be several percent off."""
    fc1, fc2 = layers(gated, torch.float32)
    x = torch.randn(64 * TILE_TOKENS, 6, requires_grad=True)
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out = tiled_mlp(x, fc1, fc2, gated=gated)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    expected = torch.autograd.grad(layer_by_layer(x, fc1, fc2, gated).square().sum(), inputs)
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert torch.linalg.vector_norm(grad - exact) < 0.01 * torch.linalg.vector_norm(exact)


def test_keeps_the_input_and_what_fc1_gives() -> None:
    fc1, fc2 = layers(False, torch.float32)
    x = torch.randn(2 * TILE_TOKENS, 6, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tiled_mlp(x, fc1, fc2, gated=False)
    assert sum(t.numel() for t in kept if len(t) in (len(x), TILE_TOKENS)) == x.numel() + len(x) * 8
