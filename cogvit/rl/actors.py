"""Rollouts by Ray actors, and judges in actors of their own: a RolloutEngine that works while its user trains.

What an answer is does not depend on who gives it, so a dead actor's requests are given out again, with the same noise
and by the weights that they began with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.errors import CogViTError, DataError
from cogvit.rl.crew import Crew, Place, Report, Work, check_room, fetched, stored
from cogvit.rl.judge import Judge, judged
from cogvit.rl.local import Player
from cogvit.rl.patience import Hangs
from cogvit.rl.rollout import Answer, Callback, Request, Sample
from data_pipeline.server import mapped


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of one version in the object store; in a list, Ray hands the reference on and not what it names."""

    version: int
    reference: list[Any]


class RolloutActor:
    """A policy and its tasks in a process of their own."""

    def __init__(self, new_player: Callable[[], Player], threads: int, directory: str) -> None:
        os.chdir(directory)  # a relative path means what it means to its user
        torch.set_num_threads(threads)
        self._player, self._stopped = new_player(), set[int]()

    def ready(self) -> Report:
        """Say that it is there."""
        return Report(os.getpid())

    def answer(self, request: Request, call: int, weights: Weights | None) -> Report:
        """Play a request; it is judged elsewhere."""
        if weights is not None and weights.version != self._player.version:
            arrays = fetched(weights.reference[0])
            if arrays is None:
                return Report(Answer(request, "stale", reason=f"weights of version {weights.version} are gone"))
            self._player.take(weights.version, {name: mapped(array) for name, array in arrays.items()})
        answer = self._player.answer(request, lambda: call in self._stopped)
        self._stopped.discard(call)
        return Report(answer, worn=self._player.hung)

    def stop(self, call: int) -> None:
        """Abort a call, from another thread than the one that answers."""
        self._stopped.add(call)


class JudgeActor:
    """A judge in a process of its own."""

    def __init__(self, new_judge: Callable[[], Judge], verify_s: float, directory: str) -> None:
        os.chdir(directory)
        torch.set_num_threads(1)
        self._judge, self._verify_s = new_judge(), verify_s

    def ready(self) -> Report:
        """Say that it is there."""
        return Report(os.getpid())

    def judged(self, request: Request, samples: tuple[Sample, ...]) -> Report:
        """Return the samples with their rewards, or the reason why there are none."""
        try:
            return Report(judged(request, samples, self._judge, self._verify_s))
        except DataError as error:
            return Report(str(error), worn=isinstance(error, Hangs))


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one waits, in seconds.

    Attributes:
        answer_s: for all answers to a request, or for what they are worth.
        verify_s: for what one episode is worth.
        start_s: for an actor to start.
    """

    answer_s: float = 600.0
    verify_s: float = 30.0
    start_s: float = 600.0


@dataclass(slots=True, eq=False)
class _Play:
    """A request on its way."""

    request: Request
    callback: Callback
    call: int
    version: int | None = None  # of the weights that were first sent with it
    aborted: bool = False
    work: Work | None = None


class RayRollouts:
    """A RolloutEngine of Ray actors; whoever makes it has joined a cluster.

    Args:
        new_player: makes the policy and its tasks, in an actor.
        new_judge: makes the judge, in an actor.
        players: the actors that roll out.
        judges: the actors that judge.
        versions_kept: so many versions of the weights are held, the newest ones; --rl.max-staleness and one.
        patience: how long it waits.

    Errors: ConfigError when the cluster has no room for the actors.
    """

    def __init__(
        self,
        new_player: Callable[[], Player],
        new_judge: Callable[[], Judge],
        players: Place,
        judges: Place,
        versions_kept: int = 1,
        patience: Patience = Patience(),
    ) -> None:
        check_room({"rollout": players, "judge": judges})
        self._events: SimpleQueue[tuple[_Play, Answer] | CogViTError] = SimpleQueue()
        self._versions_kept, self._kept = versions_kept, dict[int, Weights]()
        self._plays: dict[str, _Play] = {}
        self._calls = 0
        threads = max(1, int(players.cpus))
        directory, fail = os.getcwd(), self._events.put
        limits_s = (patience.answer_s, patience.start_s)
        player = (new_player, threads, directory)
        self._players = Crew("rollout", RolloutActor, player, players, *limits_s, fail)
        judge = (new_judge, patience.verify_s, directory)
        self._judges = Crew("judge", JudgeActor, judge, judges, *limits_s, fail)

    def set_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the object store; actors take them with their next request."""
        arrays = {name: _array(weight) for name, weight in weights.items()}
        kept = {**self._kept, version: Weights(version, [stored(arrays)])}
        newest = sorted(kept)[-self._versions_kept :]
        self._kept = {one: kept[one] for one in newest}  # another thread reads it

    def submit(self, request: Request, callback: Callback) -> None:
        """Ask. Errors: ValueError when a request of this id is on its way."""
        if request.id in self._plays:
            raise ValueError(f"request {request.id!r} is on its way already")
        play = _Play(request, callback, self._calls)
        self._calls += 1
        self._plays[request.id] = play
        play.work = Work(
            lambda actor: self._send(actor, play),
            lambda answer: self._played(play, answer),
            lambda reason: self._events.put((play, Answer(request, "failed", reason=reason))),
        )
        self._players.give(play.work, first=bool(request.begun))

    def poll(self, timeout_s: float = 0.0) -> int:
        """Call back for what has ended. Errors: what ended it all, ConfigError and TeacherUnavailable among them."""
        called = 0
        while True:
            try:
                event = self._events.get(timeout=0.0 if called else timeout_s)
            except Empty:
                return called
            if isinstance(event, CogViTError):
                raise event
            play, answer = event
            del self._plays[play.request.id]
            play.callback(replace(answer, request=play.request))
            called += 1

    def abort(self, ids: Collection[str]) -> None:
        """Stop those that have begun at their next token; what is being judged is judged."""
        for one in ids:
            play = self._plays.get(one)
            if play is None or play.work is None:
                continue
            if (actor := self._players.at(play.work)) is not None:
                play.aborted = True
                _stop(actor, play)

    @property
    def num_ready(self) -> int:
        """Actors that have started, judges among them."""
        return self._players.num_ready + self._judges.num_ready

    def close(self) -> None:
        """End the actors."""
        self._players.close()
        self._judges.close()

    def _send(self, actor: Any, play: _Play) -> Any:
        """Send a request with its weights: those asked for, else those first sent, else the newest."""
        kept, wanted = self._kept, play.request.version
        newest = max(kept, default=None)
        if wanted is None:
            wanted = play.version if play.version in kept else newest
        play.version = wanted
        weights = kept[wanted] if wanted in kept else kept.get(newest) if newest is not None else None
        reply = actor.answer.remote(replace(play.request, version=wanted), play.call, weights)
        if play.aborted:  # and the actor died before it could say so
            _stop(actor, play)
        return reply

    def _played(self, play: _Play, answer: Answer) -> None:
        """Have an answer judged, in the thread of the actors that roll out."""
        if answer.outcome != "answered":
            self._events.put((play, answer))
            return
        request = replace(play.request, begun=())

        def done(verdict: tuple[Sample, ...] | str) -> None:
            if isinstance(verdict, str):
                self._events.put((play, Answer(play.request, "failed", reason=verdict)))
            else:
                self._events.put((play, replace(answer, samples=verdict)))

        def given_up(reason: str) -> None:
            self._events.put((play, Answer(play.request, "failed", reason=reason)))

        self._judges.give(Work(lambda actor: actor.judged.remote(request, answer.samples), done, given_up))


def _stop(actor: Any, play: _Play) -> None:
    actor.stop.options(concurrency_group="control").remote(play.call)


def _array(weight: Tensor) -> NDArray[Any]:
    """A weight as numpy has it: bfloat16 as float32, which holds it exactly."""
    weight = weight.detach().cpu()
    return (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy()
