"""Which of a run's processes this one is, as its launcher says: torchrun, Slurm's srun, or nobody.

The variables are read here and nowhere else; torch and DeepSpeed, which read them too, find what was decided here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cogvit.errors import ConfigError


@dataclass(frozen=True)
class Process:
    """A process among those of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of its machine
    meets: bool = False  # its launcher says where the processes of the run meet

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return self.world_size == 1 and not self.meets

    def check_meeting(self) -> None:
        """Check that it can meet the others. Errors: ConfigError."""
        if not self.alone and not self.meets:
            raise ConfigError(
                f"RANK={self.rank} of WORLD_SIZE={self.world_size} is not told where the ranks meet; set MASTER_ADDR"
                " and MASTER_PORT, or start with torchrun, srun or launch/local.sh"
            )


def this_process() -> Process:
    """Return this process's number, from the launcher's variables or, under a bare srun, from Slurm's.

    Errors: ConfigError for variables that are missing, are no numbers, or contradict each other.
    """
    environ = os.environ
    tasks = _number("SLURM_STEP_NUM_TASKS", least=1) if "SLURM_STEP_NUM_TASKS" in environ else 1
    if "RANK" not in environ and "WORLD_SIZE" not in environ and tasks > 1:
        _take_slurm(tasks)
    local_rank = _local_rank()
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return Process(local_rank=local_rank)
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environ:
            raise ConfigError(
                f"{other}={_number(other)} is set and {name} is not; a launcher sets both: unset {other} to train"
                " alone, or start with torchrun, srun or launch/local.sh"
            )
    rank, world_size = _number("RANK"), _number("WORLD_SIZE", least=1)
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
    if world_size == 1 and tasks > 1:
        raise ConfigError(
            f"RANK=0 and WORLD_SIZE=1 stand in the environment of a Slurm step of {tasks} tasks, each of which would"
            " take itself for the only one; unset both"
        )
    meets = bool(environ.get("MASTER_ADDR")) and "MASTER_PORT" in environ
    if meets and _number("MASTER_PORT") > 65535:
        raise ConfigError(f"MASTER_PORT={environ['MASTER_PORT']} is no port; ports end at 65535")
    return Process(rank, world_size, local_rank, meets)


def speaks() -> bool:
    """Whether this process prints: the first of the ranks, and in a Slurm step each, which has a log of its own.

    One whose RANK is no number prints too: nobody else would say what is wrong.
    """
    rank = os.environ.get("RANK", "0")
    return rank == "0" or not rank.isdecimal() or "SLURM_STEP_NUM_TASKS" in os.environ


def _take_slurm(tasks: int) -> None:
    """Let Slurm's step say who this process is."""
    environ = os.environ
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ConfigError(
            "srun does not say where its ranks meet; use launch/stage1.sh or set MASTER_ADDR and MASTER_PORT"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(_number("SLURM_PROCID")), str(tasks)
    environ["LOCAL_RANK"] = str(_number("SLURM_LOCALID"))


def _local_rank() -> int:
    """Return LOCAL_RANK, which DeepSpeed insists on finding set."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(_number("SLURM_LOCALID")) if "SLURM_LOCALID" in os.environ else "0"
    return _number("LOCAL_RANK")


def _number(name: str, *, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(f"{name} is not set; start the ranks with torchrun, srun or launch/local.sh")
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ConfigError(f"{name}={text!r} in the environment must be a whole number of at least {least}; unset it")
    return int(text)
