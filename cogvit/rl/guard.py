"""Stops a run whose policy does not look at its images, or whose rollouts and training see different things.

A reward that rises proves neither: a policy learns the commonest answer without an image, and a clipped loss hides
log-probabilities that are those of another input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cogvit.config import RunConfig
from cogvit.errors import PolicyFault
from cogvit.objective.reinforce import EFFECT, GAP

_PATIENCE_STEPS = 3  # in a row, of those in which a source was measured
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
        self._blind = {source: 0 for source in sources if source not in own.without_images}

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Look at a step's figures. Errors: PolicyFault says in one line why the run must stop."""
        gap = values.get(GAP, -math.inf)
        if not gap <= self._most:
            raise PolicyFault(
                f"step {step}: rollout and training differ by {gap:.2g} nats in a token's log-probability (logprob_gap)"
                f", above rl.max_logprob_gap={self._most:g}: they see other images, weights or temperatures"
            )
        for source in self._blind:
            effect = values.get(f"{EFFECT}_{source}", math.nan)
            if math.isnan(effect):
                continue
            # Its size: the mean of a few answers may lie below 0, and of a policy that is blind it is 0.
            self._blind[source] = 0 if abs(effect) >= self._least else self._blind[source] + 1
            if self._least > 0.0 and self._blind[source] == _PATIENCE_STEPS:
                raise PolicyFault(
                    f"step {step}: the policy does not look: for {_PATIENCE_STEPS} steps other images have changed"
                    f" answers of {source} by less than rl.min_image_effect={self._least:g} nats a token"
                    f" (image_effect_{source} {effect:.2g}); see whether images reach it, or name the source in"
                    " --rl.without-images"
                )
