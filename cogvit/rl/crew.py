"""Ray actors that each do one thing at a time. This is the only module of the package that imports Ray.

Ray is imported inside the functions, after whoever calls has joined a cluster (`cogvit.teacher.actors.connect`). An
actor that dies or hangs has a successor, and what it was at is given out again. Retries are ours: Ray's own would
repeat a call that kills its actor until the actor's restarts are used up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from cogvit.errors import CogViTError, ConfigError, TeacherUnavailable
from cogvit.teacher.failures import check_started, raised

_MOST_LOSSES = 4  # of one piece of work: whatever kills an actor so often will go on to
_IDLE_S = 1.0  # after which it looks whether there is something to wait for
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What each actor of a crew takes of the cluster.

    Attributes:
        actors: how many there are.
        cpus: of each; also the threads that torch has there.
        gpus: of each.
    """

    actors: int
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What an actor says when it is done.

    Attributes:
        value: the result.
        worn: it should be replaced: something in it never came back.
    """

    value: Any
    worn: bool = False


@dataclass(slots=True, eq=False)
class Work:
    """What one actor is to do.

    Attributes:
        send: calls the actor; returns Ray's reference to a Report.
        done: takes the value, in the crew's thread.
        given_up: takes the reason why it never will be done, likewise.
        losses: how many actors were lost over it.
    """

    send: Callable[[Any], Any]
    done: Callable[[Any], None]
    given_up: Callable[[str], None]
    losses: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """An actor and what it is at."""

    actor: Any
    call: int = 0  # number of the call under way
    work: Work | None = None
    deadline_s: float = 0.0  # by time.monotonic
    ready: bool = False
    starts: int = 0  # since an actor of this lane was ready


class Crew:
    """Actors of one kind and the work that waits for them, in order.

    Args:
        name: of the kind, for messages.
        actor_class: has a method `ready`, and others that return a Report.
        arguments: of the class.
        place: what they take.
        limit_s: how long an actor may be at one piece of work.
        start_s: how long it may take to start.
        fail: takes an error that ends it all.
    """

    def __init__(
        self,
        name: str,
        actor_class: type,
        arguments: tuple[Any, ...],
        place: Place,
        limit_s: float,
        start_s: float,
        fail: Callable[[CogViTError], None],
    ) -> None:
        import ray

        options = {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        remote = ray.remote(concurrency_groups={"control": 1})(actor_class).options(**options)
        self._name, self._limit_s, self._start_s, self._fail = name, limit_s, start_s, fail
        self._start: Callable[[], Any] = lambda: remote.remote(*arguments)
        self._waiting: deque[Work] = deque()
        self._events: SimpleQueue[tuple[_Lane, int, Any] | None] = SimpleQueue()
        self._lock = threading.RLock()
        self._lanes = [_Lane(None) for _ in range(place.actors)]
        for lane in self._lanes:
            self._man(lane)
        self._thread = threading.Thread(target=self._run, name=f"crew of {name}", daemon=True)
        self._thread.start()

    def give(self, work: Work, *, first: bool = False) -> None:
        """Add work, behind all that waits or before it."""
        with self._lock:
            (self._waiting.appendleft if first else self._waiting.append)(work)
            self._hand_out()

    def at(self, work: Work) -> Any:
        """Return the actor that is at this; None before it begins and after it has ended."""
        with self._lock:
            return next((lane.actor for lane in self._lanes if lane.work is work), None)

    @property
    def num_ready(self) -> int:
        """Actors that have started."""
        with self._lock:
            return sum(lane.ready for lane in self._lanes)

    def close(self) -> None:
        """End the actors."""
        from ray import kill

        self._events.put(None)
        self._thread.join()
        for lane in self._lanes:
            kill(lane.actor)

    def _man(self, lane: _Lane) -> None:
        """Put a new actor into a lane. Errors: TeacherUnavailable when too many were lost before they were ready."""
        if lane.starts == _MOST_LOSSES:
            raise TeacherUnavailable(f"{lane.starts} {self._name} actors in a row were lost before they were ready")
        lane.actor, lane.ready, lane.work, lane.starts = self._start(), False, None, lane.starts + 1
        self._watch(lane, lane.actor.ready.remote(), self._start_s)

    def _watch(self, lane: _Lane, reply: Any, limit_s: float) -> None:
        lane.call += 1
        lane.deadline_s = time.monotonic() + limit_s
        call = lane.call
        reply.future().add_done_callback(lambda future: self._events.put((lane, call, future)))

    def _hand_out(self) -> None:
        for lane in self._lanes:
            if lane.ready and lane.work is None and self._waiting:
                lane.work = self._waiting.popleft()
                self._watch(lane, lane.work.send(lane.actor), self._limit_s)

    def _run(self) -> None:
        try:
            while self._turn():
                continue
        except CogViTError as error:
            self._fail(error)
        except Exception as error:  # a fault of ours, which must not hide in a thread
            _LOG.exception("the crew of %s failed", self._name)
            self._fail(TeacherUnavailable(f"{self._name} actors failed: {type(error).__name__}: {error}"))

    def _turn(self) -> bool:
        """Take what comes next, or end whoever is silent; returns whether to go on."""
        with self._lock:
            busy = [lane.deadline_s for lane in self._lanes if lane.work or not lane.ready]
        try:
            event = self._events.get(timeout=max(0.0, min(busy) - time.monotonic()) if busy else _IDLE_S)
        except Empty:
            with self._lock:
                self._replace_silent()
            return True
        if event is None:
            return False
        self._take(*event)
        return True

    def _take(self, lane: _Lane, call: int, future: Any) -> None:
        """Take what came of a call."""
        from ray.exceptions import ActorDiedError, RayTaskError

        with self._lock:
            if call != lane.call:
                return  # of an actor that was replaced
            error, work = future.exception(), lane.work
            if isinstance(error, RayTaskError):
                raise raised(f"a {self._name} actor", error)
            if error is not None:
                if isinstance(error, ActorDiedError):
                    check_started(f"a {self._name} actor", error)
                self._lose(lane, "died")
                return
            report: Report = future.result()
            lane.ready, lane.work, lane.starts = True, None, 0
            if report.worn:
                self._replace(lane, "is stuck")
            self._hand_out()
        if work is not None:
            work.done(report.value)

    def _replace_silent(self) -> None:
        now_s = time.monotonic()
        for lane in self._lanes:
            if (lane.work or not lane.ready) and lane.deadline_s <= now_s:
                self._lose(lane, f"was silent for {self._limit_s if lane.ready else self._start_s:g} s")

    def _lose(self, lane: _Lane, why: str) -> None:
        """Replace an actor that died or hangs, and give its work out again, unless it has cost too many."""
        work = lane.work
        self._replace(lane, why)
        if work is None:
            return
        work.losses += 1
        if work.losses < _MOST_LOSSES:
            self.give(work, first=True)
        else:
            work.given_up(f"its {self._name} actor {why}, {work.losses} times")

    def _replace(self, lane: _Lane, why: str) -> None:
        from ray import kill

        _LOG.warning("a %s actor %s; another one takes its place", self._name, why)
        kill(lane.actor)
        self._man(lane)


def stored(value: Any) -> Any:
    """Put a value into the object store; returns its reference, and what it names goes when that does."""
    import ray

    return ray.put(value)


def fetched(reference: Any) -> Any:
    """Return what a reference names, arrays mapped where the store has them; None where it is gone."""
    import ray
    from ray.exceptions import ObjectLostError

    try:
        return ray.get(reference)
    except ObjectLostError:  # also where the process that made it is gone
        return None


def check_room(places: Mapping[str, Place]) -> None:
    """Refuse crews, by name, that take more than the cluster has. Errors: ConfigError, before anybody waits."""
    import ray

    have, crews = ray.cluster_resources(), places.items()
    for kind, needs in (("CPU", [place.cpus for _, place in crews]), ("GPU", [place.gpus for _, place in crews])):
        if sum(place.actors * need for need, place in zip(needs, places.values(), strict=True)) > have.get(kind, 0.0):
            told = " and ".join(
                f"{place.actors} {name} actors of {need:g}" for need, (name, place) in zip(needs, crews, strict=True)
            )
            raise ConfigError(
                f"{told} {kind}s do not fit the Ray cluster, which has {have.get(kind, 0.0):g}; ask for fewer, or give"
                " Ray more"
            )
