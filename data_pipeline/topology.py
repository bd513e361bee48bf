"""Which canonical shares of a global batch go to which data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True, slots=True)
class Topology:
    """Groups of neighboring ranks; each group takes an equal number of canonical shares and balances within itself.

    Ranks are numbered node by node under torchrun and srun, so a group is a node, a part of one, or several whole ones
    where the numbers divide; otherwise groups are larger and the balance is still exact, only less local.
    """

    num_groups: int
    ranks_per_group: int
    shares_per_group: int


def topology_of(dp_size: int, canonical_shares: int) -> Topology:
    """Return the finest grouping of dp_size ranks whose groups take whole shares."""
    num_groups = gcd(dp_size, canonical_shares)
    return Topology(num_groups, dp_size // num_groups, canonical_shares // num_groups)
