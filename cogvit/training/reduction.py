"""Gradients of the dp ranks averaged, each rank left with its slice of them.

The parameters of a group lie end to end in a flat buffer, of which every rank owns an equal slice. At the end of a
step's backwards all gradients are there: a bucket is then one stretch of every slice, and a reduce-scatter brings each
rank its own. What is sent before is whole parameters, which lie in one slice or two: these are all-reduced.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

_UNDER_WAY = 2  # messages, of which each holds a bucket


@dataclass(frozen=True)
class FlatGroup:
    """Where the parameters of a group lie in its flat buffer, one rank's slice behind the other."""

    params: tuple[Parameter, ...]  # in the order of the buffer; behind them is padding
    starts: tuple[int, ...]  # where each begins
    slice_size: int  # elements of each rank

    @staticmethod
    def of(params: Sequence[Parameter], slice_size: int) -> FlatGroup:
        """Lay parameters end to end."""
        ends = accumulate(param.numel() for param in params)
        return FlatGroup(tuple(params), (0, *ends)[:-1], slice_size)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[Parameter, int, int]]:
        """Yield (parameter, first element, one past the last) of what lies in [start, stop) of the buffer."""
        for index in range(max(0, bisect_right(self.starts, start) - 1), len(self.params)):
            param, place = self.params[index], self.starts[index]
            if place >= stop:
                return
            first, last = max(start - place, 0), min(stop - place, param.numel())
            if first < last:
                yield param, first, last


@dataclass(frozen=True)
class _Message:
    """A bucket under way."""

    sent: Tensor
    received: Tensor
    work: dist.Work
    params: tuple[Parameter, ...] = ()  # whole ones, whose sums are received
    into: Tensor | None = None  # else the stretch of a slice that is


class Reduction:
    """Averages the gradients of some groups over a process group, once a step.

    bucket_elements: of a message. dtype: of what is sent; sums over ranks are taken in it, slices are fp32.
    """

    def __init__(
        self, groups: Sequence[FlatGroup], ranks: dist.ProcessGroup, bucket_elements: int, dtype: torch.dtype
    ) -> None:
        self._groups, self._ranks, self._bucket_elements, self._dtype = groups, ranks, bucket_elements, dtype
        self._place = {
            param: (index, first)
            for index, group in enumerate(groups)
            for param, first in zip(group.params, group.starts, strict=True)
        }
        self.forget()

    def forget(self) -> None:
        """Begin a step anew; what is under way is nobody's."""
        self._waiting: list[Parameter] = []  # of the bucket that is being filled
        self._sent_any = False
        self._under_way: deque[_Message] = deque()
        self._slices: list[Tensor] = []

    def send(self, param: Parameter) -> None:
        """Take a gradient that is complete; all ranks send the same ones in one order."""
        if not self._sent_any:
            self._sent_any = True
            self._slices = [group.params[0].new_zeros(group.slice_size) for group in self._groups]
        self._waiting.append(param)
        if sum(waiting.numel() for waiting in self._waiting) >= self._bucket_elements:
            self._send_bucket()

    def finish(self, unsent: Sequence[Parameter]) -> list[Tensor]:
        """Average the gradients that were not sent, and return this rank's slice of every group, flat."""
        if self._sent_any:
            for param in unsent:
                self.send(param)
            self._send_bucket()
        else:
            self._slices = [self._scattered(group) for group in self._groups]
        while self._under_way:
            self._settle()
        slices, size = self._slices, self._ranks.size()
        self.forget()
        if size > 1:
            torch._foreach_div_(slices, size)
        return slices

    def _scattered(self, group: FlatGroup) -> Tensor:
        """Send all of a group, the same stretch of every slice at a time, and let the gradients go."""
        size, mine = self._ranks.size(), group.params[0].new_empty(group.slice_size)
        step = max(1, self._bucket_elements // size)
        for start in range(0, group.slice_size, step):
            into = mine[start : start + step]
            parts = [
                part for rank in range(size) for part in _flat(group, rank * group.slice_size + start, len(into), into)
            ]
            if size == 1:
                torch.cat(parts, out=into)
                continue
            sent = torch.cat(parts, out=into.new_empty(size * len(into), dtype=self._dtype))
            received = into if self._dtype == into.dtype else into.new_empty(len(into), dtype=self._dtype)
            work = dist.reduce_scatter_tensor(received, sent, group=self._ranks, async_op=True)
            self._post(_Message(sent, received, work, into=into))
        for param in group.params:
            param.grad = None
        return mine

    def _send_bucket(self) -> None:
        if not self._waiting:
            return
        params = tuple(self._waiting)
        self._waiting = []
        count = sum(param.numel() for param in params)
        sent = torch.cat([_gradient(param) for param in params], out=params[0].new_empty(count, dtype=self._dtype))
        for param in params:
            param.grad = None
        self._post(_Message(sent, sent, dist.all_reduce(sent, group=self._ranks, async_op=True), params))

    def _post(self, message: _Message) -> None:
        self._under_way.append(message)
        if len(self._under_way) > _UNDER_WAY:
            self._settle()

    def _settle(self) -> None:
        """Take what the oldest message brought."""
        message = self._under_way.popleft()
        message.work.wait()
        if message.into is not None:
            if message.received is not message.into:
                message.into.copy_(message.received)
            return
        rank = self._ranks.rank()
        parts = message.received.split([param.numel() for param in message.params])
        for param, part in zip(message.params, parts, strict=True):
            index, place = self._place[param]
            size = self._groups[index].slice_size
            first, last = max(place, rank * size), min(place + len(part), (rank + 1) * size)
            if first < last:
                self._slices[index][first - rank * size : last - rank * size] = part[first - place : last - place]


def _gradient(param: Parameter) -> Tensor:
    assert param.grad is not None, "who got no gradient has a zero one"
    return param.grad.reshape(-1)


def _flat(group: FlatGroup, start: int, count: int, like: Tensor) -> Iterator[Tensor]:
    """Yield the gradients of a stretch of the buffer, and zeros for its padding."""
    for param, first, last in group.stretches(start, start + count):
        yield _gradient(param)[first:last]
        count -= last - first
    if count:
        yield like.new_zeros(count)
