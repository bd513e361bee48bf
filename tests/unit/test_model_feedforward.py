"""The MLP in tiles of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from cogvit.model.blocks import Mlp
from cogvit.model.config import CogViTConfig
from cogvit.model.feedforward import TILE_TOKENS, tiled_mlp
from cogvit.model.vit import CogViT


def layers(gated: bool, dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(6, 16 if gated else 8, bias=bias, dtype=dtype), nn.Linear(8, 6, bias=bias, dtype=dtype)


def layer_by_layer(x: Tensor, fc1: nn.Linear, fc2: nn.Linear, gated: bool) -> Tensor:
    h = fc1(x)
    return fc2(F.silu(h[:, :8]) * h[:, 8:] if gated else F.gelu(h))


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("num_tokens", [1, TILE_TOKENS, 2 * TILE_TOKENS + 7])
def test_equals_layer_by_layer_with_every_gradient(num_tokens: int, gated: bool, bias: bool) -> None:
    fc1, fc2 = layers(gated, torch.float64, bias)
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


def test_sums_gradients_of_a_bf16_model_in_fp32() -> None:
    fc1, fc2 = layers(False, torch.bfloat16)
    x = torch.randn(64 * TILE_TOKENS, 6, dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    loss = tiled_mlp(x, fc1, fc2, gated=False).float().square().sum()
    grads = torch.autograd.grad(loss, inputs)
    loss = layer_by_layer(x, fc1, fc2, False).float().square().sum()
    for grad, expected in zip(grads, torch.autograd.grad(loss, inputs), strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.linalg.vector_norm((grad - expected).float()) < 5e-3 * torch.linalg.vector_norm(expected.float())


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp(CogViTConfig(image_size=14, embed_dim=8, depth=1, num_heads=2))


def test_layers_with_hooks_are_called() -> None:
    module, seen = mlp(), []
    x = torch.randn(3, 8, requires_grad=True)
    module.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    module.fc2.register_full_backward_hook(lambda *_: seen.append("fc2"))
    module(x).sum().backward()
    assert seen == ["fc1", "fc2"]


def test_a_pruned_layer_stays_pruned() -> None:
    module = mlp()
    prune.l1_unstructured(module.fc1, "weight", 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(3, 8, requires_grad=True)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    pruned = module.fc1.weight_mask == 0
    assert not module.fc1.weight_orig.grad[pruned].any()


def test_a_replaced_layer_and_leading_dims() -> None:
    module = mlp()
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = module(x.detach())
    torch.testing.assert_close(module(x), expected)
    module.fc1 = nn.Sequential(module.fc1)  # type: ignore[assignment]
    torch.testing.assert_close(module(x.flatten(0, 1)), expected.flatten(0, 1))


def test_frozen_layers_cost_no_weight_gradients() -> None:
    module = mlp().requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    names = {node.name() for node, _ in module(x).grad_fn.next_functions if node is not None}
    assert not any("TiledMlp" in name for name in names)


@pytest.mark.parametrize("cls", [False, True])
def test_torch_func_differentiates_the_encoder(cls: bool) -> None:
    torch.manual_seed(0)
    vit = CogViT(CogViTConfig(image_size=28, embed_dim=8, depth=2, num_heads=2, use_cls_token=cls))
    images = torch.randn(2, 3, 28, 28)
    weights = {name: weight.detach() for name, weight in vit.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(vit, given, (images,))["patch_tokens"].square().sum()

    grads = torch.func.grad(loss)(weights)
    vit(images)["patch_tokens"].square().sum().backward()
    for name, weight in vit.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(grads[name], weight.grad)
