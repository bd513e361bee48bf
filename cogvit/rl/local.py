"""Rollouts in this process, one request after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from cogvit.errors import DataError
from cogvit.rl.episode import play
from cogvit.rl.judge import Judge, OwnVerifier, judged
from cogvit.rl.patience import Hangs
from cogvit.rl.rollout import Answer, Callback, Request
from cogvit.rl.speaker import Speaker
from cogvit.rl.task import NewTask


class Player:
    """A policy and the tasks that it plays: what every process that rolls out has.

    Attributes:
        version: of the policy's weights; -1 before it has been given any.
        hung: whether a call of a task never came back, so that this process should end.

    Args:
        speaker: the policy.
        tasks: by source.
        task_s: how long a call of a task may take.
    """

    def __init__(self, speaker: Speaker, tasks: Mapping[str, NewTask], task_s: float) -> None:
        self._speaker, self._tasks, self._task_s = speaker, tasks, task_s
        self.version, self.hung = -1, False

    def take(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Answer with these weights from now on. Errors: CheckpointError when one does not fit."""
        self._speaker.take(weights)
        self.version = version

    def answer(self, request: Request, stop: Callable[[], bool]) -> Answer:
        """Play a request, until `stop` says so; nothing is judged yet."""
        if request.version not in (None, self.version):
            return Answer(request, "stale", reason=f"weights of version {request.version} are gone")
        new_task = self._tasks.get(request.source)
        if new_task is None:
            return Answer(request, "failed", reason=f"there is no task {request.source!r}")
        try:
            samples = play(request, new_task, self._speaker, self.version, self._task_s, stop)
        except DataError as error:
            self.hung |= isinstance(error, Hangs)
            return Answer(request, "failed", reason=str(error))
        return Answer(request, "answered" if all(sample.over for sample in samples) else "aborted", samples)


class LocalEngine:
    """A RolloutEngine without other processes: `poll` answers one request.

    What hangs leaves a thread behind. It keeps no older weights than the newest.

    Args:
        speaker: the policy.
        tasks: by source.
        judge: says what episodes are worth; None asks the tasks.
        task_s: how long a call of a task may take.
        verify_s: how long a judge may take for an episode.
        stop: whether to interrupt an answer, which is asked between tokens.
    """

    def __init__(
        self,
        speaker: Speaker,
        tasks: Mapping[str, NewTask],
        judge: Judge | None = None,
        *,
        task_s: float = 30.0,
        verify_s: float = 30.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._player, self._stop = Player(speaker, tasks, task_s), stop
        self._judge, self._verify_s = judge or OwnVerifier(tasks), verify_s
        self._waiting: deque[tuple[Request, Callback]] = deque()

    def set_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Answer with these from now on. Errors: CheckpointError when one does not fit."""
        self._player.take(version, weights)

    def submit(self, request: Request, callback: Callback) -> None:
        """Ask."""
        (self._waiting.appendleft if request.begun else self._waiting.append)((request, callback))

    def poll(self, timeout_s: float = 0.0) -> int:
        """Answer the request that waits for longest."""
        if not self._waiting:
            return 0
        request, callback = self._waiting.popleft()
        callback(self._judged(self._player.answer(request, self._stop)))
        return 1

    def abort(self, ids: Collection[str]) -> None:
        """Do nothing: between two polls no request has begun."""

    def close(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def _judged(self, answer: Answer) -> Answer:
        if answer.outcome != "answered":
            return answer
        try:
            return replace(answer, samples=judged(answer.request, answer.samples, self._judge, self._verify_s))
        except DataError as error:
            return Answer(answer.request, "failed", reason=str(error))
