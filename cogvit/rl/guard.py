"""Stops a run whose policy does not look at its images, or whose rollouts and training see different things.

A reward that rises proves neither: a policy learns the commonest answer without an image, and a clipped loss hides
log-probabilities that are those of another input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogvit.config import RunConfig
from cogvit.errors import PolicyFault
from cogvit.objective.reinforce import EFFECT, GAP, OTHERS

_PATIENCE_STEPS = 3  # in a row, of those in which a source was measured
# Among them, unless the effect is nothing at all while answers are wrong: a policy that is sure of itself says the same
# of two images of which the same is true, and of yes and no that is every other pair.
_PATIENCE_QUESTIONS = 48
_LARGEST_GAP = {"fp32": 1e-3, "bf16": 1.0}  # nats a token


class PolicyGuard:
    """Looks at the figures of every step.

    Args:
        config: of the run.
        sources: of its tasks.
    """

    def __init__(self, config: RunConfig, sources: Sequence[str]) -> None:
        own = config.rl
        self._least = own.min_image_effect
        self._most = _LARGEST_GAP[config.precision] if own.max_logprob_gap is None else own.max_logprob_gap
        self._blind = {source: _Blind() for source in sources if source not in own.without_images}

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Look at a step's figures. Errors: PolicyFault says in one line why the run must stop."""
        gap = values.get(GAP, -math.inf)
        if not gap <= self._most:
            raise PolicyFault(
                f"step {step}: rollout and training differ by {gap:.2g} nats in a token's log-probability (logprob_gap)"
                f", above rl.max_logprob_gap={self._most:g}: they see other images, weights or temperatures"
            )
        for source, blind in self._blind.items():
            effect = values.get(f"{EFFECT}_{source}", math.nan)
            if math.isnan(effect):
                continue
            # Its size: the mean of a few answers may lie below 0, and of a policy that is blind it is 0.
            if abs(effect) >= self._least:
                self._blind[source] = _Blind()
                continue
            self._blind[source] = blind = blind.more(
                values[f"{OTHERS}_{source}"],
                at_all=effect != 0.0 or values.get(f"reward_{source}") == 1.0,
            )
            if self._least > 0.0 and blind.is_sure:
                raise PolicyFault(
                    f"step {step}: the policy does not look: for {blind.steps} steps other images have changed answers"
                    f" to {blind.questions:g} questions of {source} by less than rl.min_image_effect={self._least:g}"
                    f" nats a token (image_effect_{source} {effect:.2g}); see whether images reach it; where the task"
                    f" has none, pass --rl.without-images '[\"{source}\"]'"
                )


@dataclass(frozen=True, slots=True)
class _Blind:
    """What speaks for it that a policy does not look at a source's images.

    Attributes:
        steps: in a row in which other images changed nothing that counts.
        questions: that were asked in them.
        at_all: whether they changed anything, or every answer of a step was right, which is not to be had blind.
    """

    steps: int = 0
    questions: float = 0.0
    at_all: bool = False

    def more(self, questions: float, *, at_all: bool) -> _Blind:
        """Return it with another such step."""
        return _Blind(self.steps + 1, self.questions + questions, self.at_all or at_all)

    @property
    def is_sure(self) -> bool:
        """Whether a policy that looks would hardly be seen so."""
        return self.steps >= _PATIENCE_STEPS and (not self.at_all or self.questions >= _PATIENCE_QUESTIONS)
