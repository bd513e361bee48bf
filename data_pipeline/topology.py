"""Where ranks sit, and which canonical shares of a global batch go to which of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby
from math import ceil, floor
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
class Span:
    """A stretch of the line of all shares that begins or ends inside a share: its group has a part of that."""

    begin: Fraction
    end: Fraction
    cuts: tuple[Fraction, ...]  # where groups meet inside the shares that it touches


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place: the group that it balances with, the shares that are the group's, and what it decodes."""

    rank: int  # inside the group
    num_ranks: int
    shares: range
    decodes: Slice | None = WHOLE  # of its packs, the images that begin there; None: no image
    span: Span | None = None  # None: the shares are the group's as a whole


@dataclass(frozen=True, slots=True)
class Topology:
    """The data-parallel ranks of each node, which balance among themselves, and what of the shares is theirs.

    Nodes lie on the line of all shares one after the other, as long as they have ranks. A share in which two meet is
    planned by both and divided between them.
    """

    groups: tuple[tuple[int, ...], ...]  # dp ranks
    edges: tuple[Fraction, ...]  # [groups + 1], in shares

    def seat(self, dp_rank: int) -> Seat:
        """Return a rank's place."""
        number, group = next((number, group) for number, group in enumerate(self.groups) if dp_rank in group)
        begin, end = self.edges[number : number + 2]
        shares = range(floor(begin), ceil(end))
        cuts = tuple(edge for edge in self.edges if shares.start < edge < shares.stop and edge.denominator > 1)
        span = Span(begin, end, cuts) if cuts else None
        return Seat(group.index(dp_rank), len(group), shares, span=span)


def topology_of(addresses: Sequence[str], canonical_shares: int) -> Topology:
    """Return the nodes of all dp ranks and their shares.

    addresses are those of the dp ranks, from the network's root down (spine.leaf1.node3, or a host's name alone), so
    that neighbors in their order share a switch.
    """
    order = sorted(range(len(addresses)), key=lambda rank: addresses[rank])  # stable: neighbors share a node
    groups = tuple(tuple(ranks) for _, ranks in groupby(order, key=lambda rank: addresses[rank]))
    ends = accumulate(map(len, groups), initial=0)
    return Topology(groups, tuple(Fraction(end * canonical_shares, len(addresses)) for end in ends))


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
