"""How much memory the tensors of some code take together."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still alive, and remembers the most.

    Unlike a process's memory it knows no allocator, which keeps holes below 32 MB for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in given | self._alive:
                self._alive.add(id(storage))
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.bytes = max(self.bytes, self._now)
        return out

    def _gone(self, number: int, num_bytes: int) -> None:
        self._alive.discard(number)
        self._now -= num_bytes
