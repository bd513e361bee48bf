"""What the actors of a run take of a Ray cluster, compared with what it has before anybody waits for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogvit.config import TeachersConfig
from cogvit.errors import ConfigError


def cpus_of(config: TeachersConfig) -> int:
    """Return the CPUs that the actors of a run take."""
    return math.ceil(config.num_actors * config.actor_cpus)


def _fits(kind: str, have: float, need: float) -> int:
    """Return how many actors a node has this for; a share of a GPU lies on one GPU."""
    if kind == "GPU" and need < 1.0:
        return int(have) * int(1.0 / need + 1e-6)
    return int(have / need + 1e-6)


def check_room(config: TeachersConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Compare the actors with the CPUs and GPUs of a cluster's nodes. Errors: ConfigError, before anybody waits."""
    needs = {"CPU": config.actor_cpus, "GPU": config.actor_gpus}
    have = [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(min(_fits(kind, one.get(kind, 0.0), need) for kind, need in needs.items() if need) for one in have)
    if room < config.num_actors:
        found = "; ".join(" and ".join(f"{one.get(kind, 0.0):g} {kind}s" for kind in needs) for one in have)
        raise ConfigError(
            f"{config.num_actors} teacher actors of {config.actor_cpus:g} CPUs and {config.actor_gpus:g} GPUs do not"
            f" fit the Ray cluster, which has room for {room} (nodes: {found}); lower --teachers.actors-per-teacher,"
            " --teachers.actor-cpus or --teachers.actor-gpus, or give Ray more (RAY_CPUS and RAY_GPUS of launch/env.sh)"
        )


def idle_gpus(config: TeachersConfig, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Return what is to be said where teachers run on CPUs though there are GPUs, or nothing."""
    given = sum(node["Resources"].get("GPU", 0.0) for node in nodes if node["Alive"])
    if config.actor_gpus or not (given or torch.cuda.is_available()):
        return ""
    return (
        f"the teachers run on CPUs, {config.actor_cpus:g} for each of {config.num_actors} actors, and Ray may give them"
        f" {given:g} GPUs; --teachers.actor-gpus 1 (or a share) puts each on a GPU that Ray has (RAY_GPUS of"
        " launch/env.sh)"
    )


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks a run's actors.

    Attributes:
        number: of this asker, from 0; those that ask at the same time begin at different actors.
        count: how many ask.
        gpus: UUIDs of the GPUs on which ranks train.
    """

    number: int = 0
    count: int = 1
    gpus: frozenset[str] = frozenset()


ALONE = Asker()


def lanes_of(actors: int, asker: Asker) -> list[int]:
    """Return the actors of a teacher that one asker asks, in turn: two or more, and all are asked by somebody.

    So the cluster's head is not asked for all by all.
    """
    count = min(actors, max(2, -(-actors // asker.count)))
    first = asker.number * actors // asker.count if 1 < asker.count < actors else asker.number
    return [(first + place) % actors for place in range(count)]


def free_gpus(visible: Sequence[str], used: Collection[int]) -> list[str]:
    """Return the GPUs of a machine, by the names in CUDA_VISIBLE_DEVICES, on which no rank trains."""
    return [name for index, name in enumerate(visible) if index not in used]


def check_apart(gpu: str, ranks_gpus: Collection[str]) -> None:
    """Refuse a GPU, by its UUID, on which a rank trains. Errors: ConfigError."""
    if gpu in ranks_gpus:
        raise ConfigError(
            f"Ray gave a teacher's actor GPU {gpu}, on which a rank trains; start Ray with other GPUs (its"
            " CUDA_VISIBLE_DEVICES) and fewer ranks, or pass --teachers.share-gpus true"
        )
