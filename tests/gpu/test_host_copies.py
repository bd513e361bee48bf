"""Copies to host memory beside the step: what is offloaded comes back as it was, a snapshot reuses pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvit.parallel.offload import Offload
from cogvit.training.snapshot import Snapshot
from cogvit.training.zero import Fragment

BLOCKS, WIDTH, TOKENS = 12, 1024, 8192


def train(device: torch.device, offload: Offload | None) -> tuple[list[Tensor], int]:
    """Gradients of some layers, and the bytes that were held at most."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)).to(device)
    x = torch.randn(TOKENS, WIDTH, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        y = x
        for layer in layers:
            if offload is None:
                y = torch.nn.functional.gelu(layer(y))
            else:
                with offload.of_one_forward():
                    y = torch.nn.functional.gelu(layer(y))
        y.square().mean().backward()
    return [p.grad for p in layers.parameters() if p.grad is not None], torch.cuda.max_memory_allocated(device)


def test_what_was_offloaded_comes_back_to_the_bit_and_leaves_the_device(device: torch.device) -> None:
    expected, kept_bytes = train(device, None)
    actual, moved_bytes = train(device, Offload(device, ahead_bytes=2 * 4 * TOKENS * WIDTH))
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)
    assert moved_bytes < 0.6 * kept_bytes


def test_a_snapshot_reuses_page_locked_memory(device: torch.device) -> None:
    values, snapshot = torch.randn(1000, device=device), Snapshot(device)
    fragments = [
        Fragment("one", "master", torch.Size([600]), 0, values[:600]),
        Fragment("two", "master", torch.Size([500]), 100, values[600:]),
    ]
    first = snapshot.take(fragments)
    assert all(one.values.is_pinned() for one in first)
    assert torch.equal(torch.cat([one.values for one in first]), values.cpu())
    values.mul_(2.0)
    again = snapshot.take(fragments)
    assert [one.values.data_ptr() for one in again] == [one.values.data_ptr() for one in first]
    assert torch.equal(torch.cat([one.values for one in again]), values.cpu())
