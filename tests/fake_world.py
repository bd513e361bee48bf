"""One rank of a world of thousands that are not there: what it would send, wait for and compute, counted.

torch's fake process group answers every collective at once with what this rank brought and drops its messages, so the
numbers of the answers mean nothing and their shapes and counts everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["collective", "message", "wait", "operation"]

_MESSAGES = {"send", "recv_"}  # each one of a batch is on its own
_READS = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
# They hand out memory, or another view of it, and start nothing on a device.
_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "new_empty", "permute",
    "promote_types", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """What a rank did, in order."""

    events: list[tuple[Kind, str]] = field(default_factory=list)

    def count(self, kind: Kind) -> int:
        """Return how many events were of a kind."""
        return sum(one == kind for one, _ in self.events)


class _Dispatched(TorchDispatchMode):
    """Collectives, messages, and operations that a device would run."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            self._log.events.append(("message" if name in _MESSAGES else "collective", name))
        elif name not in _VIEWS:
            self._log.events.append(("operation", name))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Where Python reads a tensor's values: on a device it waits for them."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and getattr(Tensor, name, None) is func:
            self._log.events.append(("wait", name))
        return func(*args, **(kwargs or {}))


@contextmanager
def logged() -> Iterator[Log]:
    """Record what torch is asked for inside."""
    log = Log()
    with _Called(log), _Dispatched(log):
        yield log


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of a world of this size, in a process that is in no other."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
