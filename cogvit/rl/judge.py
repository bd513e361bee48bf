"""What episodes are worth: judges are apart from tasks and from whoever rolls out, and hear texts alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cogvit.config.reinforcement import task_file
from cogvit.errors import ConfigError, DataError
from cogvit.rl.foreign import from_file
from cogvit.rl.patience import patient
from cogvit.rl.rollout import Request, Sample
from cogvit.rl.task import NewTask


@dataclass(frozen=True, slots=True)
class Episode:
    """What was said in an episode that is over; what was shown is a function of it."""

    source: str
    seed: int
    texts: tuple[str, ...]


Judge = Callable[[Episode], float]


@dataclass(frozen=True)
class OwnVerifier:
    """A judge that asks the task itself, which it plays again.

    tasks: by source.
    """

    tasks: Mapping[str, NewTask]

    def __call__(self, episode: Episode) -> float:
        """Return what the task's `verify` says."""
        task = self.tasks[episode.source]()
        task.reset(episode.seed)
        for text in episode.texts:
            task.step(text)
        return task.verify(episode.texts[-1])


@dataclass(frozen=True)
class Weighted:
    """A judge that is the weighted mean of several.

    judges: with their weights, which are above 0.
    """

    judges: Sequence[tuple[Judge, float]]

    def __call__(self, episode: Episode) -> float:
        """Return the mean."""
        return sum(weight * judge(episode) for judge, weight in self.judges) / sum(weight for _, weight in self.judges)


OWN = "task"  # of the names of judges


def check_judges(names: Sequence[str]) -> None:
    """Look for judges without making any. Errors: ConfigError names one that is unknown, does not load or is none."""
    for name in names:
        if name != OWN:
            _found(name)


def judge_of(weights: Sequence[tuple[str, float]], tasks: Mapping[str, NewTask]) -> Judge:
    """Return the weighted mean of judges, of the task's own verifier alone where none is named.

    Args:
        weights: of `task` and of FILE.py:NAME, functions of an Episode or classes of such, which are made here.
        tasks: by source.

    Errors: as `check_judges`, and ConfigError when a class cannot be made.
    """
    judges = [(OwnVerifier(tasks) if name == OWN else _made(name), weight) for name, weight in weights]
    return Weighted(judges) if judges else OwnVerifier(tasks)


def _made(name: str) -> Any:
    found = _found(name)
    if not inspect.isclass(found):
        return found
    try:
        return found()
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"--rl.judge {name} cannot be made: {told}") from None


def _found(name: str) -> Any:
    file = task_file(name)
    if file is None:
        raise ConfigError(f"--rl.judge {name} is unknown; judges are {OWN} and FILE.py:NAME")
    found = from_file(f"--rl.judge {name}", *file)
    if found is None:
        raise ConfigError(f"--rl.judge {name}: {file[0]} has no {file[1]}")
    called, arguments = found, 1
    if inspect.isclass(found):  # its own method, and not that of all classes, which makes one
        own = (vars(above).get("__call__") for above in found.__mro__)
        called, arguments = next(filter(None, own), None), 2
    try:
        inspect.signature(called).bind(*[None] * arguments)
    except (TypeError, ValueError):
        raise ConfigError(
            f"--rl.judge {name} is no function of an episode, its one argument, nor a class of such"
        ) from None
    return found


def judged(request: Request, samples: Sequence[Sample], judge: Judge, verify_s: float) -> tuple[Sample, ...]:
    """Return the samples of a request with their rewards.

    Errors: DataError when the judge raises or says what is no finite number; Hangs when it takes longer than verify_s.
    """
    return tuple(replace(sample, reward=_reward(request, sample, judge, verify_s)) for sample in samples)


def _reward(request: Request, sample: Sample, judge: Judge, verify_s: float) -> float:
    episode = Episode(request.source, request.seed, tuple(turn.text for turn in sample.turns))
    name = f"the verifier of {request.source!r}"
    said = patient(name, verify_s, judge, episode)
    try:
        reward = float(said)
    except (TypeError, ValueError):
        raise DataError(f"{name} says {said!r:.60}, which is no number") from None
    if not math.isfinite(reward):
        raise DataError(f"{name} says {reward}")
    return reward
