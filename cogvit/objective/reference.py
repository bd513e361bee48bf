"""The weights that a policy began with: they wait in host memory, and take its place for a pass."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from cogvit.errors import ConfigError
from cogvit.parallel.mesh import Mesh

_MEMORY = Path("/proc/meminfo")


class Reference:
    """A copy of a module's weights as they are now, of those that will be trained.

    Host memory: as many bytes as this rank's part of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
        self._pairs = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the module's weights for these, and back; one parameter at a time is there twice."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, waiting in self._pairs:
            own = parameter.detach().to("cpu", copy=True)
            parameter.copy_(waiting)
            waiting.copy_(own)


def check_room(module: nn.Module, mesh: Mesh) -> None:
    """Look whether this machine's memory takes the references of its ranks; collective over all ranks.

    Errors: ConfigError on every rank.
    """
    own = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    host = socket.gethostname()
    needed = sum(num_bytes for other, num_bytes in mesh.gather((host, own)) if other == host)
    free, failure = free_bytes(), None
    if free is not None and needed > free:
        failure = ConfigError(
            f"rl.kl_weight needs the weights that the run began with in host memory: {needed / 1e9:.3g} GB on {host},"
            f" which has {free / 1e9:.3g} GB free; use more nodes or a larger tp or pp, or pass --rl.kl-weight 0"
        )
    mesh.raise_together(failure)


def free_bytes() -> int | None:
    """Return what this machine's memory still takes; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
