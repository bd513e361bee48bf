"""What Slurm tells a rank of its place in the cluster."""

from __future__ import annotations

import os

from cogvit.config import RunConfig


def place_line(config: RunConfig, rank: int) -> str:
    """Say where a rank is: the first line of its log on a cluster."""
    tp_rank, pp_rank, dp_rank = config.parallel.place(rank)
    node = os.environ.get("SLURMD_NODENAME", "?")
    switches = os.environ.get("SLURM_TOPOLOGY_ADDR", node).split(".")[:-1]
    return f"rank={rank} tp={tp_rank} pp={pp_rank} dp={dp_rank} node={node} switch={switches[-1] if switches else '?'}"
