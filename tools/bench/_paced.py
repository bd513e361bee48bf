"""A policy that says tokens at a fixed pace, and a task for it: rollouts without a processor's load."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvit.draws import uniform
from cogvit.model.chat import Message
from cogvit.rl.judge import OwnVerifier
from cogvit.rl.local import Player
from cogvit.rl.rollout import Speech
from cogvit.rl.speaker import Asked, Said

READ_AT_ONCE = 16  # tokens of a prompt or of an aborted answer that take the time of one that is said
PROMPT_TOKENS = 32
_LENGTH_COUNTER = 1


@dataclass(frozen=True)
class Paced:
    """Says every token of a group in the same time; how many an answer has is log-normal, by its key.

    Attributes:
        median_tokens: of an answer.
        sigma: of the logarithm of its length; 0 makes all alike.
        token_s: of one token, whatever the number of answers side by side.
    """

    median_tokens: int
    sigma: float
    token_s: float

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Speak the same with all weights."""

    def length(self, key: int, most: int) -> int:
        """Return the tokens of an answer, by the method of Box and Muller."""
        u, v = uniform(torch.tensor(key), torch.tensor([_LENGTH_COUNTER, _LENGTH_COUNTER + 1])).tolist()
        normal = math.sqrt(-2.0 * math.log(1.0 - u)) * math.cos(2.0 * math.pi * v)
        return min(max(round(self.median_tokens * math.exp(self.sigma * normal)), 1), most)

    def speak(self, asked: Sequence[Asked], speech: Speech, stop: Callable[[], bool]) -> list[Said]:
        """Wait as long as it takes."""
        rest = [self.length(one.key, speech.max_new_tokens) - len(one.said) for one in asked]
        read = max(PROMPT_TOKENS + len(one.said) for one in asked)
        time.sleep(self.token_s * read / READ_AT_ONCE)
        said = 0
        while said < max(rest) and not stop():
            time.sleep(self.token_s)
            said += 1
        return [self._said(min(said, own), ended=own <= said) for own in rest]

    def _said(self, tokens: int, *, ended: bool) -> Said:
        return Said(np.zeros(tokens, np.int32), np.full(tokens, -1.0, np.float32), ended, "so" if ended else "")


class Chat:
    """A task that wants one answer, whatever it is."""

    source = "chat"

    def reset(self, seed: int) -> Sequence[Message]:
        """Ask."""
        return [{"role": "user", "content": f"What about {seed}?"}]

    def step(self, text: str) -> None:
        """One answer ends it."""

    def verify(self, answer: str) -> float:
        """Any will do."""
        return 1.0


def new_player(policy: Paced) -> Player:
    """Return what an actor has."""
    return Player(policy, {Chat.source: Chat}, task_s=30.0)


def new_judge() -> OwnVerifier:
    """Return the judge."""
    return OwnVerifier({Chat.source: Chat})
