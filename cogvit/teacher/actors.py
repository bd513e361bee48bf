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
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.config import TeachersConfig
from cogvit.errors import ConfigError, TeacherUnavailable
from cogvit.teacher.failures import check_started, raised
from cogvit.teacher.room import ALONE, Asker, check_room, idle_gpus, lanes_of
from cogvit.teacher.scratch import end_children, scratch
from cogvit.teacher.serving import TeacherActor
from cogvit.teacher.stream import DecodeImage, FeatureRequest, Features, answer_bytes
from cogvit.teacher.zoo import inspect_teacher

_OBJECT_STORE_BYTES = 256 * 2**20  # a few steps of masked features; Ray's default is a third of the memory
_RETRY_PAUSE_S = 0.1
_REQUESTS_AT_ONCE = 2  # of an actor: one at the teacher, one whose images are decoded
_HEALTH = "health"  # the thread of an actor that says how it does
_LOG = logging.getLogger(__name__)


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
def connect(
    cluster: Cluster, num_cpus: int, batch_bytes: int = 0, gpus: Sequence[str] | None = None
) -> Iterator[Cluster]:
    """Join the cluster for the length of the block, from the main thread; yields it with its address.

    A cluster of our own is started by the first to connect, has num_cpus for actors, the machine's GPUs or those
    named, and room for batch_bytes beside features, and ends with the block; its processes are bound to this one, so
    they end when it is killed too.

    Errors: ConfigError when the cluster cannot be reached, TeacherUnavailable when Ray does not start.
    """
    if cluster.host not in ("", socket.gethostname()):
        raise ConfigError(
            f"the teachers' Ray cluster was started on {cluster.host} and does not reach {socket.gethostname()}; start"
            " Ray on every node and pass --teachers.ray-address"
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if cluster.token:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    import ray

    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        with _kept_sigterm(), _visible(gpus):
            address = _join(cluster) if cluster.address else _start(cluster, num_cpus, batch_bytes, stack)
        yield replace(cluster, address=address)


@contextmanager
def _visible(gpus: Sequence[str] | None) -> Iterator[None]:
    """Let a cluster that is started inside see some GPUs alone; None is all that this process sees."""
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is not None:
        os.environ[name] = ",".join(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif gpus is not None:
            del os.environ[name]


def _start(cluster: Cluster, num_cpus: int, batch_bytes: int, stack: ExitStack) -> str:
    """Start a cluster on this machine, which ends with the stack; returns its address.

    Errors: ConfigError when there is no place for its files, TeacherUnavailable when Ray gives up.
    """
    import ray

    for more_tries in (1, 0):  # Ray gives itself 15 or 30 s, which is short on a busy machine
        with ExitStack() as attempt:
            directory = attempt.enter_context(scratch())
            attempt.callback(end_children, directory)  # of a start that fails Ray leaves some
            attempt.callback(ray.shutdown)
            try:
                context = ray.init(
                    address="local",
                    namespace=cluster.namespace,
                    num_cpus=num_cpus,
                    object_store_memory=_OBJECT_STORE_BYTES + batch_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=directory,
                )
            except Exception as error:  # it has no narrower one for processes that do not start in time
                reason = str(error).partition("\n")[0]
                if not more_tries:
                    raise TeacherUnavailable(
                        f"Ray did not start here: {reason}; start again when it is less busy"
                    ) from error
                _LOG.warning("Ray did not start (%s); once more", reason)
                continue
            stack.push(attempt.pop_all())
            return context.address_info["gcs_address"]
    raise AssertionError("unreachable")


def _join(cluster: Cluster) -> str:
    import ray

    try:
        ray.init(
            address=cluster.address,
            namespace=cluster.namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"cannot join Ray at {cluster.address}: {reason}; check --teachers.ray-address") from error
    return cluster.address


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Restore the process's own SIGTERM handler: ray.init puts one of its own, which leaves at once, in its place."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handler)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who serves a lane of a teacher. Ray keeps a dead actor's name, so its successor is of the next generation."""

    teacher: str
    lane: int  # 0 .. actors_per_teacher - 1
    generation: int
    handle: Any = field(compare=False)  # ray.actor.ActorHandle


@dataclass(frozen=True, slots=True)
class Call:
    """A request under way at one actor."""

    actor: Actor
    reply: Any  # ray.ObjectRef


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A request that is under way at one actor of every teacher, or waits to be sent while `calls` is empty."""

    request: FeatureRequest
    size_bytes: int  # of the answer
    calls: dict[str, Call]


class TeacherPool:
    """The actors of a run as a FeatureSource; every rank that asks has a pool, and all pools share the actors.

    Which actor answers does not matter to the answer, so a dead one is replaced and its requests are sent again. Ray
    puts the actors on the nodes in turn, where there are the CPUs and GPUs that they take.

    asker: who has this pool.
    Errors: ConfigError when the cluster has no room for the actors.
    """

    def __init__(self, config: TeachersConfig, decode: DecodeImage, asker: Asker = ALONE) -> None:
        import ray

        nodes = ray.nodes()
        check_room(config, nodes)
        if asker.number == 0 and (note := idle_gpus(config, nodes)):
            _LOG.warning("%s", note)
        self._config = config
        self._decode, self._ranks_gpus = decode, asker.gpus
        self._members = {member.name: member for member in config.members}
        self._actor_class = ray.remote(concurrency_groups={_HEALTH: 1})(TeacherActor)
        own = lanes_of(config.actors_per_teacher, asker)
        self._turn = Lock()  # a run's own batches and held-out ones are asked for by two threads
        self._lanes = itertools.cycle(own)
        self._heard: dict[Actor, int] = {}  # who has answered us -> its num_answered when we last looked
        dims = {member.name: inspect_teacher(member.path, member.layer).dim for member in config.members}
        self._dims = {member.name + part: dims[member.name] for member in config.members for part in member.parts}
        self._waiting: deque[Pending] = deque()  # not sent yet
        self._in_flight_bytes = 0
        self._actors = {
            (name, lane): self._get_or_start(name, lane, generation=0) for name in self._members for lane in own
        }

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher's features, by name."""
        return self._dims

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The teachers' precision."""
        return dict.fromkeys(self._dims, torch.bfloat16 if self._config.precision == "bf16" else torch.float32)

    def submit(self, request: FeatureRequest) -> Pending:
        """Send a request to one actor of every teacher, once fewer bytes than max_in_flight_bytes are under way."""
        pending = Pending(request, answer_bytes(request, self._dims, self._config.precision), {})
        with self._turn:
            self._waiting.append(pending)
            self._send_waiting()
        return pending

    def _send_waiting(self) -> None:
        """Send what fits, in order; one alone always does."""
        limit_bytes = self._config.max_in_flight_bytes
        while self._waiting and (
            not self._in_flight_bytes or self._in_flight_bytes + self._waiting[0].size_bytes <= limit_bytes
        ):
            self._start(self._waiting.popleft())

    def _start(self, pending: Pending) -> None:
        lane = next(self._lanes)
        pending.calls.update({name: self._send(name, lane, pending.request) for name in self._members})
        self._in_flight_bytes += pending.size_bytes

    def result(self, handle: Pending) -> Features:
        """Wait for the replies; requests of actors that died or hang are sent again.

        An actor hangs that has answered nobody for a quarter of max_wait_s; all ranks queue at the same ones.
        Errors: TeacherUnavailable after max_wait_s or when a teacher fails; ConfigError when one does not load.
        """
        with self._turn:
            return self._result(handle)

    def _result(self, handle: Pending) -> Features:
        if not handle.calls:
            self._waiting.remove(handle)
            self._start(handle)
        deadline_s = time.monotonic() + self._config.max_wait_s
        features: Features = {}
        for name in self._members:
            features |= self._collect(name, handle, deadline_s)
        self._in_flight_bytes -= handle.size_bytes
        self._send_waiting()
        return features

    def _collect(self, name: str, pending: Pending, deadline_s: float) -> Features:
        from ray import get, kill
        from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

        asked_s, lost = time.monotonic(), False
        while True:
            actor = pending.calls[name].actor
            # Only who has answered before can hang: loading weights may take all the time there is.
            patience_s = self._config.max_wait_s / (4 if actor in self._heard else 1)
            try:
                wait_s = max(0.0, min(patience_s, deadline_s - time.monotonic()))
                reply, self._heard[actor] = get(pending.calls[name].reply, timeout=wait_s)
                if lost:
                    late_s = time.monotonic() - asked_s
                    _LOG.warning("teacher %s answers again, %.1f s late; nothing is skipped", name, late_s)
                return {own: _from_wire(array) for own, array in reply.items()}
            except GetTimeoutError:
                if time.monotonic() >= deadline_s or actor not in self._heard:
                    raise self._unavailable(name, "is silent") from None
                if self._has_moved(actor, min(patience_s / 2, deadline_s - time.monotonic())):
                    continue
                kill(actor.handle)
                self._replace(actor)
            except RayTaskError as error:  # the actor lives; what it ran raised
                raise raised(f"teacher {name!r}", error) from error
            except (ActorDiedError, OutOfMemoryError) as error:  # the latter at every call, once it was killed
                if isinstance(error, ActorDiedError):
                    check_started(f"teacher {name!r}", error)
                self._replace(actor)
            except RayError as error:
                _LOG.warning("a reply of teacher %s was lost (%s); the request is sent again", name, error)
                time.sleep(_RETRY_PAUSE_S)
            if time.monotonic() >= deadline_s:
                raise self._unavailable(name, "keeps failing")
            lost = True
            pending.calls[name] = self._send(name, actor.lane, pending.request)

    def _has_moved(self, actor: Actor, timeout_s: float) -> bool:
        """Whether an actor has answered anybody since we last looked; one that does not even say so has not."""
        from ray import get
        from ray.exceptions import RayError

        before = self._heard[actor]
        try:
            asked = actor.handle.num_answered.options(concurrency_group=_HEALTH).remote()
            self._heard[actor] = get(asked, timeout=max(0.0, timeout_s))
        except RayError:
            return False
        return self._heard[actor] > before

    def _replace(self, dead: Actor) -> None:
        """Start the successor of a dead or hung actor, unless an earlier request of its has done so."""
        if self._actors[dead.teacher, dead.lane] is dead:
            _LOG.warning("an actor of teacher %s died or hangs; another one takes over its requests", dead.teacher)
            self._actors[dead.teacher, dead.lane] = self._get_or_start(dead.teacher, dead.lane, dead.generation + 1)

    def _send(self, name: str, lane: int, request: FeatureRequest) -> Call:
        actor = self._actors[name, lane]
        return Call(actor, actor.handle.features.remote(request))

    def _get_or_start(self, name: str, lane: int, generation: int) -> Actor:
        """Start an actor, or take the one that another rank has started under the same name."""
        member = self._members[name]
        if os.path.isdir(member.path):  # the actor's working directory is another
            member = replace(member, path=os.path.abspath(member.path))
        named = self._actor_class.options(
            name=f"{name}-{lane}-{generation}",
            get_if_exists=True,
            num_cpus=self._config.actor_cpus,
            num_gpus=self._config.actor_gpus,
            scheduling_strategy="SPREAD",
            max_concurrency=_REQUESTS_AT_ONCE,
            max_restarts=0,
        )
        return Actor(name, lane, generation, named.remote(member, self._config, self._decode, self._ranks_gpus))

    def _unavailable(self, name: str, state: str) -> TeacherUnavailable:
        return TeacherUnavailable(
            f"teacher {name!r} {state}: no features in {self._config.max_wait_s:g} s; look at its memory and CPUs, or"
            " raise --teachers.max-wait-s"
        )


def _from_wire(array: NDArray[Any]) -> Tensor:
    """Return [M, C] in memory of its own, so that Ray can free the reply."""
    features = torch.tensor(array)
    return features.view(torch.bfloat16) if features.dtype == torch.uint16 else features
