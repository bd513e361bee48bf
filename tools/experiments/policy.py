"""What a model is worth in tasks: rewards on episodes that no run has asked, beside the same answers given blindly.

usage: python -m tools.experiments.policy RUN [RUN ...] --tasks NAME,... [--prompts N] [--group N] [--max-new-tokens N]

RUN              a run of stage 3 or 4, or a directory of a whole vision-language model
--tasks NAME,... as --rl.tasks takes them
--prompts N      of each task (default: 100)
--group N        answers to each prompt, drawn at temperature 1 (default: 8)
--max-new-tokens N  of an answer (default: 12)

For each run and task: the mean reward, the share of prompts with a right answer among the group (pass@k), and chance:
what the same answers are worth to other prompts of the task.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.rl.figures import PASSED
from cogvit.rl.judge import Episode, OwnVerifier
from cogvit.rl.local import LocalEngine
from cogvit.rl.rollout import Answer, Request, Speech
from cogvit.rl.speaker import PlainSpeaker
from cogvit.rl.task import NewTask, tasks_of
from cogvit.training.joint import load_joint

_FIRST_EPISODE = (1 << 31) + (1 << 30)  # neither stage 4 nor tools.make_demo_tasks asks those from here on


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    runs: tuple[str, ...]
    tasks: str = ""
    prompts: str = "100"
    group: str = "8"
    max_new_tokens: str = "12"


@dataclass(frozen=True)
class Worth:
    """What a model is worth in a task."""

    reward: float
    passed: float
    chance: float


def measure(arguments: Arguments) -> int:
    """Print the figures; returns the exit status."""
    for name in ("prompts", "group", "max_new_tokens"):
        if not getattr(arguments, name).isdigit() or int(getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be a positive whole number")
    tasks = tasks_of(arguments.tasks)
    print("| run | task | reward | pass@k | chance |\n|---|---|---|---|---|")
    for run in arguments.runs:
        speaker = PlainSpeaker(load_joint(Path(run)))
        for source in tasks:
            found = worth(speaker, tasks, source, arguments)
            print(f"| {run} | {source} | {found.reward:.3f} | {found.passed:.3f} | {found.chance:.3f} |", flush=True)
    return 0


def worth(speaker: PlainSpeaker, tasks: Mapping[str, NewTask], source: str, arguments: Arguments) -> Worth:
    """Ask a model the first episodes of a task that are kept for this."""
    answers: list[Answer] = []
    engine = LocalEngine(speaker, tasks)
    engine.set_weights(0, {})
    speech = Speech(max_new_tokens=int(arguments.max_new_tokens))
    for number in range(int(arguments.prompts)):
        seed = _FIRST_EPISODE + number
        engine.submit(Request(f"{source}-{seed}", source, seed, int(arguments.group), speech), answers.append)
    while engine.poll():
        continue
    rewards = [[sample.reward or 0.0 for sample in answer.samples] for answer in answers]
    judge = OwnVerifier(tasks)
    blind = [
        judge(Episode(source, other.request.seed, tuple(turn.text for turn in sample.turns)))
        for answer, other in zip(answers, [*answers[1:], answers[0]], strict=True)
        for sample in answer.samples
    ]
    passed = fmean(float(max(own, default=0.0) >= PASSED) for own in rewards)
    return Worth(fmean(reward for own in rewards for reward in own), passed, fmean(blind))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, measure))
