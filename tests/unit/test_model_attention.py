"""Attention within the segments of a pack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cogvit.model.attention import packed_attention, segments_of, varlen_kernel_takes
from cogvit.model.tokens import order_behind_cls, token_order


def bounds(lengths: list[int], padding: int) -> Tensor:
    return torch.tensor([0, *lengths, padding], dtype=torch.int32).cumsum(0).to(torch.int32)


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = False) -> Tensor:
    """Softmax with everything outside the segment masked, and what follows where causal; zeros at the padding."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    slot = torch.repeat_interleave(torch.tensor([*lengths, len(q) - sum(lengths)]))
    outside = slot[:, None] != slot[None, :]
    if causal:
        outside = outside | torch.ones_like(outside).triu(1)
    scores = torch.einsum("qhk,thk->hqt", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(outside, -torch.inf).softmax(-1)
    valid = (slot < len(lengths)).to(q.dtype)[:, None, None]
    return torch.einsum("hqt,thk->qhk", weights, v) * valid


@given(st.lists(st.integers(0, 7), max_size=9), st.integers(0, 5), st.booleans(), st.sampled_from([1, 2, 4]))
def test_equals_masked_softmax_with_gradients(lengths: list[int], padding: int, causal: bool, kv_heads: int) -> None:
    num_tokens = sum(lengths) + padding
    heads = (4, kv_heads, kv_heads)
    qkv = [torch.randn(num_tokens, each, 4, dtype=torch.float64, requires_grad=True) for each in heads]
    out = packed_attention(*qkv, segments_of(bounds(lengths, padding)), causal=causal)
    expected = by_hand(*qkv, lengths, causal)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), qkv)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weight).sum(), qkv), strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_padding_is_zero_and_nothing_leaks_from_it() -> None:
    q, k, v = (torch.randn(12, 2, 4) for _ in range(3))
    segments = segments_of(bounds([4, 5], 3))
    out = packed_attention(q, k, v, segments)
    for x in (q, k, v):
        x[9:] = torch.nan
    assert torch.equal(packed_attention(q, k, v, segments), out)
    assert not out[9:].any()


def test_a_pack_of_padding_still_reaches_q_k_and_v() -> None:
    qkv = [torch.randn(5, 2, 4, requires_grad=True) for _ in range(3)]
    packed_attention(*qkv, segments_of(bounds([0, 0], 5))).sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in qkv)


def test_neighbors_of_equal_length_become_one_batch() -> None:
    assert segments_of(bounds([6, 6, 6], 2)).runs == ((3, 6),)
    assert segments_of(bounds([3, 3, 0, 3, 5, 3], 4)).runs == ((2, 3), (1, 3), (1, 5), (1, 3))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "takes"),
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float16, 256, True),
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.bfloat16, 36, False),
        ("cuda", torch.float32, 64, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_what_the_varlen_kernel_takes(device: str, dtype: torch.dtype, head_dim: int, takes: bool) -> None:
    assert varlen_kernel_takes(torch.device(device), dtype, head_dim) == takes


def test_wrong_shapes_are_refused() -> None:
    segments = segments_of(bounds([4], 2))
    x = torch.randn(6, 2, 4)
    with pytest.raises(ValueError, match=r"\(6, 2, 4\), \(6, 1, 4\)"):
        packed_attention(x, x[:, :1], x, segments)
    with pytest.raises(ValueError, match=r"expected three of \(6, heads"):
        packed_attention(x[:5], x[:5], x[:5], segments)


def test_the_order_that_a_device_makes_is_the_hosts() -> None:
    """Of images that no sorting moves: absent slots lie in between and at the end."""
    bounds = torch.tensor([0, 3, 3, 7, 12, 12, 12, 15], dtype=torch.int32)
    host, device = token_order(segments_of(bounds), cls=True), order_behind_cls(segments_of(bounds))
    for name in ("source_S", "place_S"):
        assert torch.equal(getattr(device, name), getattr(host, name))
    assert torch.equal(device.segments.cu_seqlens, host.segments.cu_seqlens)
    assert device.segments.lengths == host.segments.lengths
