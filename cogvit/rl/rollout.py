"""Requests for answers and what comes back: values, and the little that whoever answers must offer.

A request names an episode by its source and seed. What is shown, images too, is a function of these and of the answers
before, so requests and answers carry no pixels: who rolls out, judges or trains plays the task again.

Shape letters beyond the project's: n tokens of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cogvit.rl.ledger import End, Entry

Outcome = Literal["answered", "aborted", "failed", "stale"]


@dataclass(frozen=True, slots=True)
class Speech:
    """How a policy speaks.

    Attributes:
        seed: of the draws, which are hashes of it, the request's id, the sample, the turn and the token's place.
        max_new_tokens: of a turn, its end included.
        temperature: 1 draws as the model says; log-probabilities are those of what is drawn from.
        max_turns: an episode that goes on for longer has failed.

    Errors: ValueError when a number is out of range.
    """

    seed: int = 0
    max_new_tokens: int = 32
    temperature: float = 1.0
    max_turns: int = 8

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.max_turns < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} and max_turns={self.max_turns} must be at least 1")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0")


@dataclass(frozen=True, slots=True)
class Span:
    """Neighboring tokens of a turn that the same weights said."""

    version: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One answer of an episode, or as much as was said of it.

    Attributes:
        ended: by its last token or for its length, rather than aborted.
        text: as the task hears it; empty before it has ended.
        tokens: [n] int32, with the token that ends it unless it was cut; that may be the image token, which is never
            read.
        logprobs: [n] float32, nats, of the weights that said each and at the temperature of the request.
        spans: who said it; their tokens sum to n.
    """

    ended: bool
    text: str
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One episode of a request.

    Attributes:
        turns: its answers; none of an episode that is over has zero tokens.
        over: whether the task has ended it; the last turn of one that was aborted may be unfinished.
        reward: what it was worth, from 0 to 1; None before it was judged.
    """

    turns: tuple[Turn, ...] = ()
    over: bool = False
    reward: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that were said."""
        return sum(len(turn.tokens) for turn in self.turns)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt, and how often it is to be answered.

    Attributes:
        id: unique in the run; a prompt that was aborted and is taken up again keeps it.
        source: of the task.
        seed: of the episode.
        samples: answers to it, a group.
        speech: how they are drawn.
        version: of the weights that must answer; None takes the newest.
        begun: what was said before it was aborted, one for each sample; empty for a new one.
    """

    id: str
    source: str
    seed: int
    samples: int
    speech: Speech = Speech()
    version: int | None = None
    begun: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of a request.

    Attributes:
        request: the one that was submitted.
        outcome: `answered`, every sample over and judged; `aborted` with what was said so far; `failed` because the
            task or its verifier did; `stale` because the weights that it asks for are gone.
        samples: one for each that was asked for; empty where it failed or is stale.
        reason: of a failure or of stale weights, in one line.
    """

    request: Request
    outcome: Outcome
    samples: tuple[Sample, ...] = ()
    reason: str = ""

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions of the weights that have said something, the oldest first."""
        turns = (turn for sample in self.samples for turn in sample.turns)
        return tuple(sorted({span.version for turn in turns for span in turn.spans}))

    def entry(self, step: int, end: End) -> Entry:
        """Return its line of the ledger; the version is -1 where nothing was said."""
        return Entry(self.request.id, self.request.source, (*self.versions, -1)[0], step, end)


Callback = Callable[[Answer], None]


class RolloutEngine(Protocol):
    """Who answers. Each request that is submitted is called back once, by `poll`, in the thread that polls."""

    def set_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Answer what begins from now on with these, by the plain model's names; what is left out stays as it was.

        The tensors may change after the call. Versions rise. Errors: CheckpointError when a weight does not fit.
        """

    def submit(self, request: Request, callback: Callback) -> None:
        """Ask; requests begin in the order in which they come, but first those that were aborted. It does not wait."""

    def poll(self, timeout_s: float = 0.0) -> int:
        """Call back for what has ended and return for how many; waits so long for the first.

        Errors: TeacherUnavailable when nobody answers any more.
        """

    def abort(self, ids: Collection[str]) -> None:
        """Interrupt those of these requests that have begun; they are called back soon, aborted or answered."""

    def close(self) -> None:
        """End; what was not called back never is."""
