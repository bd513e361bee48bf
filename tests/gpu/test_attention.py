"""Attention on the GPU: the varlen kernel in bf16 and the batched one in fp32, against softmax in fp64 by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogvit.model.attention import packed_attention, segments_of
from tests.unit.test_model_attention import bounds, by_hand

PACKS = {
    "ragged": ([17, 1, 64, 5, 129], 11),
    "equal": ([16, 16, 16], 0),
    "absent_slots": ([9, 0, 33, 0, 0], 6),
    "one_long": ([1024], 0),
}
# Of the norm: bf16 keeps 8 bits, and a probability and a value each round once; fp32 sums in another order.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def qkv(
    num_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device, heads: tuple[int, int] = (3, 3)
) -> list[Tensor]:
    """Random queries, keys and values that are exact in the dtype; heads of the queries and of the others."""
    g = torch.Generator().manual_seed(num_tokens)
    made = (torch.randn(num_tokens, each, head_dim, generator=g) for each in (heads[0], heads[1], heads[1]))
    return [x.to(device, dtype).requires_grad_() for x in made]


@pytest.mark.parametrize(("causal", "heads"), [(False, (3, 3)), (True, (3, 3)), (True, (6, 2))])
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lengths", "padding"), PACKS.values(), ids=PACKS)
def test_equals_softmax_in_fp64_with_gradients(
    lengths: list[int],
    padding: int,
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    heads: tuple[int, int],
    device: torch.device,
) -> None:
    ours = qkv(sum(lengths) + padding, head_dim, dtype, device, heads)
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    out = packed_attention(*ours, segments_of(bounds(lengths, padding).to(device)), causal=causal)
    expected = by_hand(*exact, lengths, causal)
    assert out.dtype == dtype
    assert not out[sum(lengths) :].any()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weight.to(out)).sum(), ours)
    wanted = torch.autograd.grad((expected * weight.to(dtype).double()).sum(), exact)
    for actual, exactly in zip((out, *grads), (expected, *wanted), strict=True):
        assert (actual.cpu().double() - exactly).norm() <= TOLERANCE[dtype] * exactly.norm()


def test_nothing_leaks_from_the_padding(device: torch.device) -> None:
    given = [x.detach() for x in qkv(40, 64, torch.bfloat16, device)]
    segments = segments_of(bounds([20, 12], 8).to(device))
    out = packed_attention(given[0], given[1], given[2], segments)
    for x in given:
        x[32:] = torch.nan
    assert torch.equal(packed_attention(given[0], given[1], given[2], segments), out)


def test_a_pack_of_padding_still_reaches_q_k_and_v(device: torch.device) -> None:
    given = qkv(8, 64, torch.bfloat16, device)
    packed_attention(*given, segments_of(bounds([0, 0], 8).to(device))).sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in given)
