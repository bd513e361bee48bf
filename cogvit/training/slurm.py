"""What Slurm tells a rank of its place in the cluster."""

from __future__ import annotations

import os

from cogvit.config import RunConfig


def place_line(config: RunConfig, rank: int, device: str) -> str:
    """Say where a rank is and on what: the first line of its log on a cluster."""
    tp_rank, pp_rank, dp_rank = config.parallel.place(rank)
    node = os.environ.get("SLURMD_NODENAME", "?")
    switches = os.environ.get("SLURM_TOPOLOGY_ADDR", node).split(".")[:-1]
    place = f"rank={rank} tp={tp_rank} pp={pp_rank} dp={dp_rank} device={device} node={node}"
    return f"{place} switch={switches[-1] if switches else '?'}"
