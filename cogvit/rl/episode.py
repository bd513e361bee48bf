"""Episodes: played by a policy, and played again by whoever judges them or trains on them.

A task is foreign code: it may raise, hang or never end. Then the request has failed, for a reason of one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cogvit.errors import DataError
from cogvit.model.chat import Message
from cogvit.rl.patience import patient
from cogvit.rl.rollout import Request, Sample, Span, Turn
from cogvit.rl.speaker import Asked, Said, Speaker, noise_key
from cogvit.rl.task import NewTask, Task

_NOTHING_SAID = np.zeros(0, np.int32)


def conversations(new_task: NewTask, seed: int, texts: Sequence[str]) -> list[list[Message]]:
    """Return the conversation that each of these answers of an episode answered, images included.

    Errors: DataError when the episode ends before its last answer; what the task raises.
    """
    task = new_task()
    talk = list(task.reset(seed))
    talks = [talk]
    for text in texts[:-1]:
        after = task.step(text)
        if after is None:
            raise DataError(f"task {task.source!r}: the episode of seed {seed} ends otherwise than it did before")
        talk = [*talk, {"role": "assistant", "content": text}, *after]
        talks.append(talk)
    return talks


def play(
    request: Request, new_task: NewTask, speaker: Speaker, version: int, task_s: float, stop: Callable[[], bool]
) -> tuple[Sample, ...]:
    """Return the request's samples, all of them over unless `stop` has said so, which is asked between tokens.

    Args:
        request: what was begun of it goes on.
        new_task: makes its task.
        speaker: who answers.
        version: of its weights.
        task_s: how long a call of the task may take.
        stop: whether to abort.

    Errors: DataError when the task raises, never ends or shows what is no conversation, an answer has no tokens or no
    finite log-probability; Hangs when a call of the task does not return.
    """
    begun = request.begun or (Sample(),) * request.samples
    scenes = [_Scene.opened(request, sample, new_task, task_s) for sample in begun]
    first = scenes[0].talk
    for scene in scenes:
        if not scene.num_ended:
            scene.talk = first  # the same for all, so it is read once
    while going := [(number, scene) for number, scene in enumerate(scenes) if not scene.over]:
        if stop():
            break
        for _, scene in going:
            if scene.num_ended == request.speech.max_turns:
                raise DataError(f"task {request.source!r} has not ended after {scene.num_ended} answers")
        asked = [scene.asked(request, number) for number, scene in going]
        for (_, scene), said in zip(going, speaker.speak(asked, request.speech, stop), strict=True):
            scene.hear(said, version, task_s)
    return tuple(Sample(tuple(scene.turns), scene.over) for scene in scenes)


@dataclass
class _Scene:
    """One sample at play: its task, what is to be answered next, and what was said."""

    task: Task
    talk: Sequence[Message]
    turns: list[Turn]
    over: bool = False

    @classmethod
    def opened(cls, request: Request, sample: Sample, new_task: NewTask, task_s: float) -> _Scene:
        """Play again what was said before."""
        task = patient(f"task {request.source!r}", task_s, new_task)
        talk = patient(f"reset of task {request.source!r}", task_s, lambda: list(task.reset(request.seed)))
        scene = cls(task, talk, list(sample.turns), over=sample.over)
        for turn in sample.turns:
            if turn.ended and not sample.over:
                scene.step(turn.text, task_s)
        return scene

    @property
    def num_ended(self) -> int:
        """Turns that have ended."""
        return sum(turn.ended for turn in self.turns)

    def asked(self, request: Request, number: int) -> Asked:
        """Return what is wanted next of a sample."""
        open_turn = self.turns[-1] if len(self.turns) > self.num_ended else None
        key = noise_key(request.speech, request.id, number, self.num_ended)
        return Asked(self.talk, key, _NOTHING_SAID if open_turn is None else open_turn.tokens)

    def hear(self, said: Said, version: int, task_s: float) -> None:
        """Add what was said, and let the task hear an answer that has ended."""
        before = self.turns.pop() if len(self.turns) > self.num_ended else None
        turn = _joined(before, said, version)
        if turn.ended and not len(turn.tokens):
            raise DataError("an answer has no tokens, not even its end; whoever answers must count it")
        if not np.isfinite(said.logprobs).all():
            raise DataError(f"the policy of version {version} gives a token the log-probability {said.logprobs.min()}")
        if len(turn.tokens):
            self.turns.append(turn)
        if turn.ended:
            self.step(turn.text, task_s)

    def step(self, text: str, task_s: float) -> None:
        """Let the task hear an answer."""
        after = patient(f"step of task {self.task.source!r}", task_s, lambda: _heard(self.task.step(text)))
        if after is None:
            self.over = True
        else:
            self.talk = [*self.talk, {"role": "assistant", "content": text}, *after]


def _heard(after: Sequence[Message] | None) -> list[Message] | None:
    return None if after is None else list(after)


def _joined(before: Turn | None, said: Said, version: int) -> Turn:
    """What was said of a turn in all."""
    new = (Span(version, len(said.tokens)),) if len(said.tokens) else ()
    if before is None:
        return Turn(said.ended, said.text, said.tokens, said.logprobs, new)
    spans = before.spans
    if new and spans and spans[-1].version == version:
        spans, new = spans[:-1], (Span(version, spans[-1].tokens + new[0].tokens),)
    return Turn(
        said.ended,
        said.text,
        np.concatenate([before.tokens, said.tokens]),
        np.concatenate([before.logprobs, said.logprobs]),
        (*spans, *new),
    )
