"""How many descriptors (sockets, pipes, files) a rank of a layout needs, and may have.

A gloo group opens a connection to each of its other ranks when it is made; NCCL opens none before a group is used. So
what is made for the layout costs nothing on GPUs, and on CPUs seven connections a rank of the world. The law of the
groups is that of Megatron's `initialize_model_parallel`; `tests/dist/test_descriptors.py` counts both.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

from cogvit.config import ParallelConfig
from cogvit.errors import ConfigError

_OWN = 128  # Python, its threads and pipes, shards and stores that are open, logs
_NCCL = 128  # of the communicators that a step uses; an allowance, not measured
_OF_A_GROUP = 4  # a gloo group of any size: a listening socket, two pipes, a poll
_GROUPS = 24
_OF_A_KEEPER = 32  # Python and what listens
_OF_THE_STORE = 2  # connections of each rank: one for the groups, one for those who write checkpoints
_KEPT_BY_FIRST = 16  # ranks whose store costs the first one at most 32 more; a process for it is 2 s of CPU and 220 MB


@dataclass(frozen=True)
class Descriptors:
    """What a process needs."""

    rank: int  # every rank
    first: int  # the first one
    keeper: int  # the process that keeps the store that all have met at: the first rank's child, or itself


def kept_apart(world_size: int) -> bool:
    """Whether the store of so many ranks is kept by a process of its own."""
    return world_size > _KEPT_BY_FIRST


def descriptors(layout: ParallelConfig, world_size: int, *, gloo: bool) -> Descriptors:
    """Return what the ranks of a layout need."""
    tp, pp = layout.tp, layout.pp
    dp = world_size // (tp * pp)
    connections = 5 * (tp - 1) + (pp - 1) + 3 * (dp - 1) + 2 * (tp * pp - 1) + 2 * (tp * dp - 1) + 2 * (world_size - 1)
    connections += 2 * (pp > 1) + (dp - 1)  # first and last stage; neighbors of stage 2's loss
    groups = connections + _GROUPS * _OF_A_GROUP if gloo else _NCCL
    rank = _OWN + groups + _OF_THE_STORE
    kept = _OF_THE_STORE * world_size
    if kept_apart(world_size):
        return Descriptors(rank, rank, _OF_A_KEEPER + kept)
    return Descriptors(rank, rank + kept, rank + kept)


def most_descriptors() -> int:
    """Return how many this process may have, if it asks."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 30 if hard == resource.RLIM_INFINITY else hard


def take_all_descriptors() -> None:
    """Raise this process's limit to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def take_descriptors(layout: ParallelConfig, rank: int, world_size: int, *, gloo: bool) -> None:
    """Raise this process's limit to what it needs, which the system allows up to the hard one.

    Errors: ConfigError when that is too low, on the first rank also for the process that keeps the store.
    """
    need = descriptors(layout, world_size, gloo=gloo)
    mine = need.rank if rank else need.first
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = most_descriptors()
    for who, needed in ((f"rank {rank}", mine), ("what keeps the store", 0 if rank else need.keeper)):
        if most < needed:
            raise ConfigError(
                f"ulimit -n allows {hard} open files, and {who} of {world_size} ranks needs {needed} (each rank"
                f" {need.rank}); raise the hard limit (ulimit -Hn {max(need.first, need.keeper)}, LimitNOFILE of slurmd"
                " or of the container)" + (", or start fewer ranks: on CPUs each is connected to all" if gloo else "")
            )
    wanted = min(most, mine + soft // 2)  # shards that stay open take up to half of what there was
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
