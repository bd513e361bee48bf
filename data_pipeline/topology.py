"""Where ranks sit, and which canonical shares of a global batch go to which of them."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogvit.errors import ConfigError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slice:
    """One of some equal slices of the tokens that a pack's images fill."""

    number: int
    of: int

    def begins(self, lengths: Ints) -> list[bool]:
        """Return which of the images that lie end to end in a pack begin in this slice."""
        end = np.cumsum(lengths)
        return ((end - lengths) * self.of // max(lengths.sum(), 1) == self.number).tolist()


WHOLE = Slice(0, 1)


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place: the group that it balances with, the shares that are the group's, and what it decodes."""

    rank: int  # inside the group
    num_ranks: int
    shares: range
    decodes: Slice | None = WHOLE  # of its packs, the images that begin there; None: no image


@dataclass(frozen=True, slots=True)
class Topology:
    """Groups of data-parallel ranks; each takes an equal number of neighboring shares and balances within itself.

    A group is a node where the nodes divide the shares, and otherwise the fewest neighboring nodes that do: exact and
    balanced all the same, only less local.
    """

    groups: tuple[tuple[int, ...], ...]  # dp ranks
    shares_per_group: int

    def seat(self, dp_rank: int) -> Seat:
        """Return a rank's place."""
        number, group = next((number, group) for number, group in enumerate(self.groups) if dp_rank in group)
        first = number * self.shares_per_group
        return Seat(group.index(dp_rank), len(group), range(first, first + self.shares_per_group))


def topology_of(addresses: Sequence[str], canonical_shares: int) -> Topology:
    """Return the finest grouping by whole nodes whose groups take whole shares.

    addresses are those of the dp ranks, from the network's root down (spine.leaf1.node3, or a host's name alone), so
    that neighbors in their order share a switch. Nodes of unequal numbers of ranks make one group.
    """
    order = sorted(range(len(addresses)), key=lambda rank: addresses[rank])  # stable: neighbors share a node
    nodes = Counter(addresses)
    num_groups = gcd(len(nodes), canonical_shares) if len(set(nodes.values())) == 1 else 1
    size = len(order) // num_groups
    groups = tuple(tuple(order[start : start + size]) for start in range(0, len(order), size))
    return Topology(groups, canonical_shares // num_groups)


def local_address(path: str) -> str:
    """Return this process's place in the network: from a file, else SLURM_TOPOLOGY_ADDR, else the host's name.

    The file has a line for each host: its name and its address, as in `node3 spine.leaf1.node3`.
    Errors: ConfigError for a file that cannot be read or lacks this host.
    """
    host = socket.gethostname()
    if not path:
        return os.environ.get("SLURM_TOPOLOGY_ADDR") or host
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data.topology {path} cannot be read: {error}") from None
    words = {parts[0]: parts[1] for line in lines if len(parts := line.split()) == 2}
    if host not in words:
        raise ConfigError(f"--data.topology {path} has no line 'HOST ADDRESS' for {host}; add it")
    return words[host]
