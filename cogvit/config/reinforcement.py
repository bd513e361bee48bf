"""The fields of reinforcement learning: tasks, rollouts, the loss and the guard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogvit.config.option import option


@dataclass(frozen=True)
class ReinforcementConfig:
    """What a policy is asked, how its answers are drawn, and what it learns from them."""

    tasks: str = option("", "names of tasks and FILE.py:NAME of tasks of your own, with commas between")
    mixture: tuple[tuple[str, float], ...] = option((), "weights of the tasks' sources; equal if empty")
    group: int = option(8, "answers to each prompt, which are compared with each other")
    max_new_tokens: int = option(32, "of an answer, its end included")
    temperature: float = option(1.0, "of the distribution that answers are drawn from and that is trained")
    actors: int = option(0, "Ray actors that answer; 0: the first rank answers between steps")
    actor_cpus: float = option(1.0, "CPUs that an actor takes, and its threads")
    actor_gpus: float = option(0.0, "GPUs that it takes: a fraction shares one, 0 is the CPU")
    judge: tuple[tuple[str, float], ...] = option(
        (),
        "what episodes are worth: `task` and FILE.py:NAME of judges of your own, by weight; the task's if empty",
    )
    judges: int = option(1, "Ray actors that judge what the others answered")
    task_s: float = option(30.0, "how long a call of a task, or what an episode is worth, may take")
    max_staleness: int = option(
        0, "steps by which the weights that answered may be older than those that learn from it; 0 waits for them"
    )
    abort_after_s: float = option(
        0.0, "a step that has waited for so long takes what there is; what has begun goes on in the next one; 0: never"
    )
    abort_after_fraction: float = option(
        1.0, "below 1: a step's prompts divided by this are on their way, and what it overtakes goes on in the next one"
    )
    loss: Literal["grpo", "gspo"] = option("grpo", "ratios of tokens, or of whole answers")
    clip_low: float = option(0.2, "how far a ratio may fall below 1; GSPO's authors take 3e-4")
    clip_high: float = option(0.2, "how far a ratio may rise above 1; GSPO's authors take 4e-4")
    dual_clip: float = option(
        3.0, "the ratio from which an answer that is worse than its group teaches nothing more; 0: however large"
    )
    kl_weight: float = option(
        0.0, "of the divergence from the weights that the run began with, which then wait in host memory; 0: without"
    )
    min_image_effect: float = option(
        1e-3,
        "nats a token by which other images must change the answers of each source; a policy of which they change less"
        " for 3 steps and 48 questions, or nothing for 3 steps, does not look, and the run stops; 0 lets it go on",
    )
    without_images: tuple[str, ...] = option((), "sources whose tasks show no image")
    max_logprob_gap: float | None = option(
        None,
        "the most, in nats, by which rollout and training may differ in a token's log-probability before the run stops;"
        " 1e-3 in fp32 and 1 in bf16 if none",
    )

    @property
    def cpus(self) -> int:
        """CPUs that actors and judges take of a Ray cluster."""
        return math.ceil(self.actors * self.actor_cpus + self.judges) if self.actors else 0


def task_file(name: str) -> tuple[Path, str] | None:
    """Return the file and what is meant in it of a FILE.py:NAME; None of a name alone."""
    path, _, inside = name.strip().rpartition(":")
    return (Path(path).expanduser(), inside) if path else None
