"""What learning one task does to the others, by rewards and by right answers, and what learning all at once gives.

usage: python -m tools.experiments.interference [flags]

--work DIR        episodes, runs and figures; what is there is used again (default: runs/interference)
--seeds N,...     of episodes, weights and draws, each a start of its own (default: 0,1,2)
--tasks NAME,...  of `cogvit.rl.families` (default: all)
--samples N       right answers, all tasks together (default: 36000)
--start-steps N   of stage 3 on 64 of them, all tasks together (default: 600)
--steps N         of each way, for each task that it trains (default: 50)
--answers N       of each of stage 4's steps, 8 to a prompt (default: 96)
--prompts N       of each task, to be worth something in (default: 100)
--group N         answers to each of these, drawn at temperature 1 (default: 4)

All ways of a seed begin with the same start, which has seen all tasks: `policy` is stage 4 with GRPO, `answers` goes on
with stage 3; each on every task alone for N steps, and on all together for N times their number. Tables hold the mean
reward of the start, and by how much each way has changed it: a row what was trained, a column what was asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.rl.families import FAMILIES
from tools.experiments.commands import positive, train_run, whole_numbers
from tools.experiments.policy_course import (
    Course,
    Exam,
    Worth,
    learn_policy,
    learn_start,
    worths,
)
from tools.experiments.tables import spread, table

WAYS = ("policy", "answers")
ALL = "all"  # tasks, one beside the other
_LONGEST_ANSWER = 40  # tokens
_RATE = 2e-4  # of stage 4, the demo's
Worths = dict[str, Worth]  # by task


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    work: str = "runs/interference"
    seeds: str = "0,1,2"
    tasks: str = ",".join(FAMILIES)
    samples: str = "36000"
    start_steps: str = "600"
    steps: str = "50"
    answers: str = "96"
    prompts: str = "100"
    group: str = "4"


@dataclass(frozen=True)
class Seen:
    """What a seed's models are worth in every task.

    Attributes:
        start: before.
        after: by the way and what was trained, a task or `ALL`.
    """

    start: Worths
    after: dict[tuple[str, str], Worths]


def measure(arguments: Arguments) -> int:
    """Print the figures; returns the exit status. Errors: ConfigError; as training."""
    tasks = arguments.tasks.split(",")
    if unknown := [name for name in tasks if name not in FAMILIES]:
        raise ConfigError(f"--tasks {unknown[0]} is unknown; tasks are {', '.join(FAMILIES)}")
    numbers = {
        name: positive(name, getattr(arguments, name))
        for name in ("samples", "start_steps", "steps", "answers", "prompts", "group")
    }
    start, each = (numbers["samples"], numbers["start_steps"]), (numbers["steps"], numbers["answers"])
    course = Course(*start, *each, _LONGEST_ANSWER, _RATE, actors=1)
    exam = Exam(numbers["prompts"], numbers["group"], _LONGEST_ANSWER)
    seeds = whole_numbers("seeds", arguments.seeds)
    found = [seen(Path(arguments.work), tasks, seed, course, exam) for seed in seeds]
    for line in record(tasks, found):
        print(line, flush=True)
    return 0


def seen(work: Path, tasks: Sequence[str], seed: int, course: Course, exam: Exam) -> Seen:
    """Train a seed's start and from it every way, unless that is done. Errors: as training."""
    asked = ",".join(tasks)
    start = learn_start(work, asked, seed, course)
    after = {}
    for way in WAYS:
        for trained in (*tasks, ALL):
            run = go_on(start, way, tasks if trained == ALL else [trained], seed, course, trained)
            after[way, trained] = worths(run, asked, exam)
    return Seen(worths(start, asked, exam), after)


def go_on(start: Path, way: str, tasks: Sequence[str], seed: int, course: Course, name: str) -> Path:
    """Train one way from a start, unless that is done; returns the run's directory. Errors: as training."""
    steps = course.steps * len(tasks)
    if way == "policy":
        return learn_policy(start, ",".join(tasks), seed, 0, replace(course, steps=steps), f"policy_{name}")
    out, shown = start.with_name(f"{start.name}_answers_{name}_{steps}"), start.with_name("tasks")
    train_run(
        *("demo_rl_start", "--init", start, "--out", out, "--seed", seed, "--language.path", shown / "language"),
        *("--data.shards", shown / "train" / "*.tar", "--data.eval-shards", shown / "heldout" / "*.tar"),
        *("--data.mixture", json.dumps([[task, 1.0 / len(tasks)] for task in tasks])),
        *("--schedule.steps", steps, "--checkpoint.every-steps", steps, "--eval.every-steps", steps),
    )
    return out


def record(tasks: Sequence[str], found: Sequence[Seen]) -> Iterator[str]:
    """Yield the tables: what starts are worth, and for each way what it has changed, means over the seeds."""
    yield f"{f'Mean of {len(found)} seeds ± their standard deviation' if len(found) > 1 else 'One seed'}. The starts:"
    yield ""
    lines = [
        [name, *(_spread([getattr(one.start[task], field) for one in found]) for task in tasks)]
        for name, field in (("reward", "reward"), ("pass@k", "passed"), ("chance", "chance"))
    ]
    yield from table(["start", *tasks], lines)
    for way in WAYS:
        yield ""
        yield f"Change of the reward by `{way}`, trained on the row and asked the column:"
        yield ""
        lines = []
        for trained in (*tasks, ALL):
            changes = [
                [one.after[way, trained][task].reward - one.start[task].reward for one in found] for task in tasks
            ]
            others = [own for task, own in zip(tasks, changes, strict=True) if task != trained]
            mean = [fmean(values) for values in zip(*others, strict=True)]
            lines.append([trained, *(_change(own) for own in changes), _change(mean)])
        yield from table([way, *tasks, "mean of all but itself"], lines)


def _change(values: Sequence[float]) -> str:
    return f"{'+' if fmean(values) >= 0.0 else ''}{_spread(values)}"


def _spread(values: Sequence[float]) -> str:
    return spread(values) if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, measure))
