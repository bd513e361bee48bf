"""Tasks that do what tasks should not, and a policy for them; actors import this."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cogvit import VisionLanguageModel
from cogvit.model.chat import Message
from cogvit.rl.families import FAMILIES, ask
from cogvit.rl.judge import OwnVerifier
from cogvit.rl.local import Player
from cogvit.rl.speaker import PlainSpeaker
from cogvit.rl.task import NewTask
from tests.language import picture, tiny_vlm


class Twice:
    """Asks about two pictures; the second is a function of the first answer."""

    source = "twice"

    def reset(self, seed: int) -> Sequence[Message]:
        self.said: list[str] = []
        return ask(picture(24, 16, seed), "And?")

    def step(self, text: str) -> Sequence[Message] | None:
        self.said.append(text)
        return None if len(self.said) == 2 else ask(picture(16, 24, len(text)), "Then?")

    def verify(self, answer: str) -> float:
        return len("".join(self.said)) / 100


WRONG_TALKS: dict[str, list[Message]] = {
    "asks nothing": [],
    "shows nothing": [{"role": "user"}],
    "says nothing": [{"role": "user", "content": None}],
}


class Bad(Twice):
    """Does one thing wrong: what, its source says."""

    def __init__(self, source: str) -> None:
        self.source = source

    def reset(self, seed: int) -> Sequence[Message]:
        if self.source == "raises":
            raise RuntimeError("no\nway")
        if self.source in WRONG_TALKS:
            return WRONG_TALKS[self.source]
        return super().reset(seed)

    def step(self, text: str) -> Sequence[Message] | None:
        if self.source == "leaves":
            raise SystemExit(3)
        while self.source == "hangs":
            time.sleep(0.01)
        if self.source == "goes on with nothing":
            return True  # type: ignore[return-value]
        return ask(picture(16, 16), "More?") if self.source == "endless" else super().step(text)

    def verify(self, answer: str) -> Any:
        while self.source == "judge hangs":
            time.sleep(0.01)
        if self.source == "judge raises":
            raise KeyError("truth")
        return {"nan": float("nan"), "words": "very good"}.get(self.source, 0.5)


BAD = (
    "raises", *WRONG_TALKS, "goes on with nothing", "leaves", "hangs", "endless", "judge hangs", "judge raises", "nan",
    "words",
)  # fmt: skip
TASKS: dict[str, NewTask] = {**FAMILIES, "twice": Twice} | {source: partial(Bad, source) for source in BAD}


def policy(**options: Any) -> VisionLanguageModel:
    """A tiny model that ends an answer after ten tokens or so."""
    return tiny_vlm(**{"eos_ids": tuple(range(20, 45)), **options})


class Mortal(Twice):
    """A task whose process dies once in each method for which there is a mark."""

    source = "mortal"

    def __init__(self, marks: str) -> None:
        self._marks = Path(marks)

    def step(self, text: str) -> Sequence[Message] | None:
        self._die_of("step")
        return super().step(text)

    def verify(self, answer: str) -> float:
        self._die_of("verify")
        return super().verify(answer)

    def _die_of(self, method: str) -> None:
        with suppress(FileNotFoundError):  # one of several processes finds it
            (self._marks / method).unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def tasks_with(marks: str) -> dict[str, NewTask]:
    """All tasks, and one that is mortal."""
    return {**TASKS, "mortal": partial(Mortal, marks)}


def new_player(marks: str, task_s: float) -> Player:
    """What an actor has; its answers are as long as they may be."""
    return Player(PlainSpeaker(policy(eos_ids=())), tasks_with(marks), task_s)


def new_judge(marks: str) -> OwnVerifier:
    """Asks the tasks."""
    return OwnVerifier(tasks_with(marks))
