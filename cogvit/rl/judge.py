"""What episodes are worth: judges are apart from tasks and from whoever rolls out, and hear texts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cogvit.errors import DataError
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
