"""What autograd keeps, in host memory while it waits: copies that on CUDA run beside the step, both ways.

Going out, a copy into page-locked memory begins as soon as a tensor is there. Coming back, backward asks for what was
kept last first, so what it will ask for next is on its way while it works. Memory of the device is taken and given back
in the order of the step's own stream, which waits for a copy before it does either: so the host, which runs ahead, does
not keep in the device's memory what was to leave it.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_AHEAD_BYTES = 256 * 2**20  # under way at a time, each way


class _Kept:
    """One tensor in host memory, and on the device again once somebody has sent for it."""

    def __init__(self, host: Tensor, place: int) -> None:
        self.host, self.place = host, place
        self.back: Tensor | None = None
        self.arrived: Any = None  # a CUDA event


class Offload:
    """Moves what the forwards of one tower keep; weights, which stay where they are anyway, are left there."""

    def __init__(self, device: torch.device, ahead_bytes: int = _AHEAD_BYTES) -> None:
        self._device, self._ahead_bytes = device, ahead_bytes
        self._stream: Any = None  # for copies; made at the first, on CUDA
        self._leaving: deque[tuple[Tensor, Any]] = deque()  # with the event at which each has left

    def of_one_forward(self) -> saved_tensors_hooks:
        """Return the hooks under which one forward is run."""
        kept: list[ref[_Kept]] = []  # autograd owns them, and lets go of one after the other

        def pack(tensor: Tensor) -> Tensor | _Kept:
            if isinstance(tensor, nn.Parameter):
                return tensor
            one = _Kept(self._sent(tensor), len(kept))
            kept.append(ref(one))
            return one

        def unpack(saved: Tensor | _Kept) -> Tensor:
            return saved if isinstance(saved, Tensor) else self._taken(saved, kept)

        return saved_tensors_hooks(pack, unpack)

    def _sent(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        event = self._copy(host, tensor)
        if event is not None:
            self._leaving.append((tensor, event))
            while sum(one.nbytes for one, _ in self._leaving) > self._ahead_bytes:
                self._let_go()
        return host

    def _let_go(self) -> None:
        """Have the step wait until the oldest copy out is done; the memory is then free, in the step's own order."""
        _, left = self._leaving.popleft()
        torch.cuda.current_stream(self._device).wait_event(left)

    def _taken(self, saved: _Kept, kept: list[ref[_Kept]]) -> Tensor:
        """Send for a tensor, and for those kept before it as far as there is room ahead; wait for the first alone."""
        while self._leaving:
            self._let_go()
        ahead_bytes = 0
        for one in (kept[place]() for place in range(saved.place, -1, -1)):
            if one is None:
                continue
            ahead_bytes += 0 if one is saved else one.host.nbytes
            if ahead_bytes > self._ahead_bytes:
                break
            if one.back is None:
                one.back = torch.empty_like(one.host, device=self._device)
                one.arrived = self._copy(one.back, one.host)
        back, saved.back = saved.back, None
        assert back is not None
        if saved.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(saved.arrived)
        return back

    def _copy(self, to: Tensor, what: Tensor) -> Any:
        """Copy, on CUDA on a stream of its own behind what the device was told before; returns the event of its end."""
        if self._device.type != "cuda":
            to.copy_(what)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(what, non_blocking=True)
            return self._stream.record_event()
