"""What a policy is worth in tasks, and what it learns of each: rewards on episodes that no run has asked.

usage: python -m tools.experiments.policy worth RUN [RUN ...] --tasks NAME,... [flags]
       python -m tools.experiments.policy start TASKS [TASKS ...] [flags]
       python -m tools.experiments.policy learn TASKS [TASKS ...] [flags]

worth             of runs of stage 3 or 4, or of directories of whole vision-language models
start             trains what it then measures: on each TASKS, a name of `cogvit.rl.families` or several with commas
                  between, learned jointly, a start by the preset demo_rl_start
learn             and from it policies by demo_rl
--tasks NAME,...  worth: as --rl.tasks takes them
--work DIR        start, learn: episodes, runs and figures; what is there is used again (default: runs/policy)
--seeds N,...     start, learn: of episodes, weights and draws, each a start of its own (default: 0)
--staleness N,... learn: of each policy; above 0 Ray actors answer (default: 0)
--actors N        learn: so many; answers are as stale as they may be where these are faster than training (default: 1)
--samples N       start, learn: right answers to begin with (default: 12000)
--start-steps N,...  start, learn: of 64 of them, one number for all TASKS or one for each (default: 200)
--steps N         learn: of the policy (default: 100)
--answers N       learn: of each of these, 8 to a prompt (default: 192)
--lr RATE         learn: of the policy (default: 1e-4)
--picture FILE    learn: where the rewards of all steps are drawn, as SVG
--prompts N       to be worth something in, of each task (default: 100)
--group N         answers to each of these, drawn at temperature 1 (default: 8)
--max-new-tokens N  of an answer (default: 40)

For each policy and task: the mean reward, the share of prompts with a right answer among the group (pass@k), and
chance: what the same answers are worth to other prompts of the task.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.rl.families import FAMILIES
from cogvit.rl.task import tasks_of
from tools.experiments.commands import positive, whole_numbers
from tools.experiments.policy_course import Course, Exam, Learned, learn_start, learned, worths
from tools.experiments.policy_record import HEAD, figures, learned_table, picture, stability_table
from tools.experiments.tables import table


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    kind: str
    what: tuple[str, ...]
    tasks: str = ""
    work: str = "runs/policy"
    seeds: str = "0"
    staleness: str = "0"
    actors: str = "1"
    samples: str = "12000"
    start_steps: str = "200"
    steps: str = "100"
    answers: str = "192"
    lr: str = "1e-4"
    picture: str = ""
    prompts: str = "100"
    group: str = "8"
    max_new_tokens: str = "40"


def measure(arguments: Arguments) -> int:
    """Print the figures; returns the exit status."""
    exam = Exam(*(positive(name, getattr(arguments, name)) for name in ("prompts", "group", "max_new_tokens")))
    match arguments.kind:
        case "worth":
            lines = worth_table(arguments.what, arguments.tasks, exam)
        case "start":
            lines = start_table(arguments, exam)
        case "learn":
            lines = learn_tables(arguments, exam)
        case _:
            raise ConfigError(f"{arguments.kind!r} must be worth, start or learn; --help explains them")
    for line in lines:
        print(line, flush=True)
    return 0


def worth_table(runs: Sequence[str], tasks: str, exam: Exam) -> Iterator[str]:
    """Yield the figures of runs. Errors: ConfigError for a task that there is not, as `worths`."""
    if not tasks:
        raise ConfigError("--tasks NAME,... is needed: what the runs are asked")
    tasks_of(tasks)
    rows = [(run, *each) for run in runs for each in worths(Path(run), tasks, exam).items()]
    yield from table(["run", "task", *HEAD], [[run, source, *figures(found)] for run, source, found in rows])


def start_table(arguments: Arguments, exam: Exam) -> Iterator[str]:
    """Train starts and yield their figures. Errors: ConfigError; as training."""
    lines = []
    for tasks, course in courses(arguments, exam):
        for seed in whole_numbers("seeds", arguments.seeds):
            run = learn_start(Path(arguments.work), tasks, seed, course)
            found = worths(run, tasks, exam).items()
            lines += [[tasks, str(seed), str(course.start_steps), source, *figures(of)] for source, of in found]
    yield from table(["tasks", "seed", "steps", "task", *HEAD], lines)


def learn_tables(arguments: Arguments, exam: Exam) -> Iterator[str]:
    """Train policies and yield their figures. Errors: ConfigError; as training."""
    seeds, stalenesses = whole_numbers("seeds", arguments.seeds), whole_numbers("staleness", arguments.staleness)
    rows = list[Learned]()
    for tasks, course in courses(arguments, exam):
        rows += learned(Path(arguments.work), tasks, course, exam, seeds, stalenesses)
    yield from learned_table(rows)
    yield ""
    yield from stability_table(rows)
    if arguments.picture:
        Path(arguments.picture).write_text(picture(rows))


def courses(arguments: Arguments, exam: Exam) -> list[tuple[str, Course]]:
    """Return each TASKS with its course. Errors: ConfigError."""
    for tasks in arguments.what:
        if unknown := [name for name in tasks.split(",") if name not in FAMILIES]:
            raise ConfigError(f"{unknown[0]!r} is no task to begin with; tasks are {', '.join(FAMILIES)}")
    samples, steps, answers, actors = (
        positive(name, getattr(arguments, name)) for name in ("samples", "steps", "answers", "actors")
    )
    start_steps, count = whole_numbers("start-steps", arguments.start_steps), len(arguments.what)
    if len(start_steps) not in (1, count) or 0 in start_steps:
        raise ConfigError(
            f"--start-steps {arguments.start_steps} must be one positive number or one for each of {count} TASKS"
        )
    each = start_steps * (count if len(start_steps) == 1 else 1)
    return [
        (tasks, Course(samples, own, steps, answers, exam.max_new_tokens, _rate(arguments.lr), actors))
        for tasks, own in zip(arguments.what, each, strict=True)
    ]


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < math.inf:
        raise ConfigError(f"--lr {value} must be a positive number")
    return rate


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, measure))
