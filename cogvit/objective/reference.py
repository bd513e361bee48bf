"""Other weights of a policy, of its start or of some steps ago: they wait in host memory for a pass in its place."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from cogvit.errors import ConfigError
from cogvit.parallel.mesh import Mesh

_MEMORY, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group that limits memory, by the name of its hierarchy: its folder, the files of the limit and of what is
# taken, and what of that can be had back.
_GROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


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


class Earlier:
    """The weights of a module in the last steps.

    versions: how many are kept.
    """

    def __init__(self, module: nn.Module, versions: int) -> None:
        self._module, self._versions = module, versions
        self._kept: dict[int, Reference] = {}

    def keep(self, version: int) -> None:
        """Copy the weights as those of a version; the oldest goes."""
        if self._versions and version not in self._kept:
            self._kept[version] = Reference(self._module)
            self._kept = {own: self._kept[own] for own in sorted(self._kept)[-self._versions :]}

    def before(self, version: int) -> list[tuple[int, Reference]]:
        """Return what is kept of the versions before one, with its age."""
        return [(version - own, reference) for own, reference in self._kept.items() if own < version]


def check_room(module: nn.Module, mesh: Mesh, copies: int) -> None:
    """Look whether this machine, container or job has memory for so many copies of its ranks' weights.

    Collective over all ranks.
    Errors: ConfigError on every rank.
    """
    own = copies * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    host = socket.gethostname()
    needed = sum(num_bytes for other, num_bytes in mesh.gather((host, own)) if other == host)
    free, failure = free_bytes(), None
    if free is not None and needed > free:
        failure = ConfigError(
            f"weights of other steps in host memory, {copies} of each rank's, take {needed / 1e9:.3g} GB on {host},"
            f" which has {free / 1e9:.3g} GB free; use more nodes, a larger tp or pp, --rl.kl-weight 0 or a smaller"
            " --rl.max-staleness"
        )
    mesh.raise_together(failure)


def free_bytes() -> int | None:
    """Return what the memory of this machine, container or job still takes; None where the system does not say."""
    free = [*_free_in_groups()]
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return min(free, default=None)


def _free_in_groups() -> Iterator[int]:
    """Yield what each control group of this process that limits memory still takes; all above it limit it too."""
    own = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    for kind, path in (line.split(":", 2)[1:] for line in own):
        if kind not in _GROUP_FILES:
            continue
        folder, limit, taken, idle = _GROUP_FILES[kind]
        names = Path(path.lstrip("/")).parts
        for depth in range(len(names) + 1):
            group = Path(_GROUPS / folder, *names[:depth])
            with suppress(OSError, KeyError, ValueError):  # there is no limit, or no such group in this container
                most, now = (int((group / name).read_text()) for name in (limit, taken))
                rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield max(0, most - now + int(rows[idle]))
