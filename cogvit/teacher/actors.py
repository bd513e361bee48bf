"""Teachers in processes of their own, served by Ray. This is the only module of the package that imports Ray.

Ray is imported inside the functions because it reads its authentication from the environment when it is first imported.
Retries are ours: Ray's own would repeat a call that kills its actor until the actor's restarts are used up.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvit.config import TeacherConfig, TeachersConfig
from cogvit.errors import CogViTError, ConfigError, TeacherUnavailable
from cogvit.teacher.stream import DecodeImage, FeatureRequest, Features, masked_features
from cogvit.teacher.zoo import inspect_teacher, load_teacher

_OBJECT_STORE_BYTES = 256 * 2**20  # a few steps of masked features; Ray's default is a third of the memory
_RESPAWN_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster and what a process needs to join it; rank 0 makes one and the other ranks get a copy."""

    address: str  # host:port; empty until `connect` has started it
    namespace: str  # of this run's actors
    host: str  # the machine it was started on; empty for a cluster that is not ours
    token: str  # empty: the environment says how to authenticate


def plan_cluster(ray_address: str) -> Cluster:
    """Describe the cluster at an address, or one of our own on this machine when the address is empty."""
    namespace = f"cogvit-{secrets.token_hex(8)}"
    if ray_address:
        return Cluster(ray_address, namespace, host="", token="")
    # Ray keeps the first token it reads for the life of a process.
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    return Cluster("", namespace, socket.gethostname(), token)


@contextmanager
def connect(cluster: Cluster, num_actors: int) -> Iterator[Cluster]:
    """Join the cluster for the length of the block, from the main thread; yields it with its address.

    A cluster of our own is started by the first to connect, has a CPU for each actor, and ends with the block; its
    processes are bound to this one, so they end when it is killed too. The SIGTERM handler of the process stays.

    Errors: ConfigError when the cluster cannot be reached; TeacherUnavailable when it does not start.
    """
    _check_reach(cluster)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if cluster.token:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    import ray

    with ExitStack() as stack:
        stack.enter_context(_kept_sigterm())
        quiet = {"namespace": cluster.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
        stack.callback(ray.shutdown)
        try:
            if cluster.address:
                context = ray.init(address=cluster.address, **quiet)
            else:
                scratch = tempfile.TemporaryDirectory(prefix="cogvit-ray-", ignore_cleanup_errors=True)
                context = ray.init(
                    address="local",
                    num_cpus=num_actors,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=stack.enter_context(scratch),
                    **quiet,
                )
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {cluster.address}; check --teachers.ray-address") from error
        yield replace(cluster, address=context.address_info["gcs_address"])
