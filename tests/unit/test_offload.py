"""What autograd keeps waits in host memory; what backward will ask for next is sent for ahead, within bounds."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from cogvit.parallel.offload import Offload, _Kept

CPU = torch.device("cpu")
SIZE = 256  # values of a tensor, 1 KiB


class Watched(Offload):
    """Notes where copies come from: what is kept goes out, what is asked for comes back."""

    def __init__(self, ahead_bytes: int) -> None:
        super().__init__(CPU, ahead_bytes)
        self.copied: list[float] = []

    def _copy(self, to: Tensor, what: Tensor) -> None:
        self.copied.append(float(what.flatten()[0]))
        super()._copy(to, what)


def chain(offload: Offload, links: int) -> tuple[Tensor, Tensor]:
    """x * 2 * 3 * 4 ..., of which each product keeps its own factor and what came before it."""
    x = torch.ones(SIZE, requires_grad=True)
    y = x
    with offload.of_one_forward():
        for link in range(links):
            y = y * torch.full((SIZE,), float(link + 2))
    return x, y.sum()


def test_what_comes_back_is_what_was_kept() -> None:
    x, loss = chain(Offload(CPU), 4)
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((SIZE,), 2.0 * 3 * 4 * 5))


def test_backward_finds_the_next_ones_on_their_way_and_no_more_than_there_is_room_for() -> None:
    offload = Watched(ahead_bytes=2 * 4 * SIZE)
    _, loss = chain(offload, 6)
    assert offload.copied == [2, 3, 4, 5, 6, 7]
    offload.copied.clear()
    seen: list[list[float]] = []
    node = loss.grad_fn.next_functions[0][0]
    while node is not None and "Mul" in node.name():
        assert node._saved_other is not None
        seen.append(list(offload.copied))
        node = node.next_functions[0][0]
    assert seen[0] == [7, 6, 5]  # the one that is asked for, and room for two ahead
    assert seen[1] == [7, 6, 5, 4]
    assert seen[-1] == [7, 6, 5, 4, 3, 2]


def test_host_memory_goes_with_the_graph() -> None:
    offload = Offload(CPU)
    _, loss = chain(offload, 2)
    held = [weakref.ref(one) for one in gc.get_objects() if isinstance(one, _Kept)]
    assert len(held) == 2
    loss.backward()
    del loss
    gc.collect()
    assert not [one for one in held if one() is not None]
