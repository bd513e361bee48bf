"""What Slurm tells a rank of its step: its number and its place."""

from __future__ import annotations

import os

from cogvit.config import RunConfig
from cogvit.errors import ConfigError


def join_slurm() -> None:
    """Under srun, take this process's rank from Slurm, unless a launcher inside the step has given it one.

    Errors: ConfigError when nobody said where the ranks meet.
    """
    environ = os.environ
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ConfigError(
            "srun does not say where its ranks meet; use launch/stage1.sh or set MASTER_ADDR and MASTER_PORT"
        )
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]


def place_line(config: RunConfig, rank: int) -> str:
    """Say where a rank is: the first line of its log on a cluster."""
    tp_rank, pp_rank, dp_rank = config.parallel.place(rank)
    node = os.environ.get("SLURMD_NODENAME", "?")
    switches = os.environ.get("SLURM_TOPOLOGY_ADDR", node).split(".")[:-1]
    return f"rank={rank} tp={tp_rank} pp={pp_rank} dp={dp_rank} node={node} switch={switches[-1] if switches else '?'}"
