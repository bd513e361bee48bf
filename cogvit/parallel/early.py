"""Gradients that are complete before backward ends: which, and in what order all ranks may send them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.nn import Parameter


class EarlyGradients:
    """Hands out a parameter as soon as the last backward of a step has its gradient, on all ranks in one order.

    That is the order from the last parameter to the first, which is nearly that of backward; one whose gradient comes
    before its turn waits for its turn.
    """

    def __init__(self, parameters: Iterable[Parameter], send: Callable[[Parameter], None]) -> None:
        self._backward = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self._send = send
        self._turn: list[Parameter] = []  # those to be sent, the next one last
        self._ready: set[Parameter] = set()
        self.sent: set[Parameter] = set()
        for parameter in self._backward:
            parameter.register_post_accumulate_grad_hook(self._note)

    def begin(self, loss: Tensor) -> None:
        """Expect the last gradients of the parameters that a loss depends on; its backward comes next."""
        reached = _leaves(loss)
        self._turn = [parameter for parameter in reversed(self._backward) if parameter in reached]
        self._ready = set()

    def end(self) -> None:
        """Expect no more of what was begun."""
        self._turn = []

    def forget(self) -> None:
        """Begin a new step."""
        self.end()
        self.sent = set()

    def _note(self, parameter: Tensor) -> None:
        if not self._turn:
            return
        assert isinstance(parameter, Parameter)
        self._ready.add(parameter)
        while self._turn and self._turn[-1] in self._ready:
            self.sent.add(self._turn[-1])
            self._send(self._turn.pop())


def _leaves(loss: Tensor) -> set[Tensor]:
    """Return the parameters that a graph ends in."""
    found, seen, waiting = set(), {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(node.variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
