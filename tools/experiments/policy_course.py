"""How a policy of the experiments comes to be, and what it is worth: the demo's presets on tasks of one's choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from cogvit.errors import DataError
from cogvit.model.layouts.files import read_json, write_json
from cogvit.rl.figures import PASSED
from cogvit.rl.judge import Episode, OwnVerifier
from cogvit.rl.local import LocalEngine
from cogvit.rl.prompts import FIRST_UNASKED_EPISODE
from cogvit.rl.rollout import Answer, Request, Speech
from cogvit.rl.speaker import PlainSpeaker
from cogvit.rl.task import NewTask, tasks_of
from cogvit.training.joint import load_joint
from cogvit.training.meter import read_metrics
from tools import index_shards, make_demo_tasks
from tools.experiments.commands import succeed, train_run


@dataclass(frozen=True)
class Course:
    """How much a policy is shown.

    Attributes:
        samples: right answers.
        start_steps: of stage 3 on these.
        steps: of stage 4.
        answers: of each of these.
        max_new_tokens: of an answer.
        lr: of stage 4.
        actors: that answer where answers may be stale.
    """

    samples: int
    start_steps: int
    steps: int
    answers: int
    max_new_tokens: int
    lr: float
    actors: int


@dataclass(frozen=True)
class Exam:
    """What a policy is asked to be worth something.

    Attributes:
        prompts: of each task.
        group: answers to each, drawn at temperature 1.
        max_new_tokens: of an answer.
    """

    prompts: int
    group: int
    max_new_tokens: int

    @property
    def name(self) -> str:
        """Tells it from others."""
        return f"{self.prompts}x{self.group}x{self.max_new_tokens}"


@dataclass(frozen=True)
class Worth:
    """What a policy is worth in a task.

    Attributes:
        reward: mean over answers.
        passed: share of prompts with a right answer.
        chance: what the same answers are worth to other prompts.
        failed: prompts that could not be answered, and count with nothing.
    """

    reward: float
    passed: float
    chance: float
    failed: int


@dataclass(frozen=True)
class Learned:
    """A policy and what it has learned of one of its tasks.

    Attributes:
        tasks: that it was trained on.
        seed: of the run.
        staleness: that was allowed.
        source: of the one task.
        before: what the start was worth in it.
        after: what the policy is worth in it.
        steps: the figures of each step of stage 4.
    """

    tasks: str
    seed: int
    staleness: int
    source: str
    before: Worth
    after: Worth
    steps: Sequence[Mapping[str, float]]


def learned(
    work: Path, tasks: str, course: Course, exam: Exam, seeds: Sequence[int], stalenesses: Sequence[int]
) -> Iterator[Learned]:
    """Train a start for each seed and policies from it, unless that is done, and yield what they have learned.

    Errors: as training, and as `worths`.
    """
    for seed in seeds:
        start = learn_start(work, tasks, seed, course)
        before = worths(start, tasks, exam)
        for staleness in stalenesses:
            policy = learn_policy(start, tasks, seed, staleness, course)
            steps = read_metrics(policy / "metrics.jsonl")
            for source, after in worths(policy, tasks, exam).items():
                yield Learned(tasks, seed, staleness, source, before[source], after, steps)


def learn_start(work: Path, tasks: str, seed: int, course: Course) -> Path:
    """Train stage 3 on right answers, unless that is done; returns the run's directory. Errors: as training."""
    home = work / tasks / f"seed_{seed}"
    shown, out = home / "tasks", home / f"start_{course.start_steps}"
    if not (shown / "language" / "config.json").exists():
        succeed(make_demo_tasks.make(make_demo_tasks.Arguments(str(shown), tasks, str(course.samples), str(seed))))
        for part in ("train", "heldout"):
            succeed(index_shards.index_shards(index_shards.Arguments(str(shown / part / "*.tar"))))
    train_run(
        *("demo_rl_start", "--out", out, "--seed", seed, "--language.path", shown / "language"),
        *("--data.shards", shown / "train" / "*.tar", "--data.eval-shards", shown / "heldout" / "*.tar"),
        *("--data.mixture", "[]", "--eval.every-steps", course.start_steps),
        *("--schedule.steps", course.start_steps, "--checkpoint.every-steps", course.start_steps),
    )
    return out


def learn_policy(start: Path, tasks: str, seed: int, staleness: int, course: Course, name: str = "policy") -> Path:
    """Train stage 4 from a start, unless that is done; returns the run's directory. Errors: as training."""
    answered_by = f"_by_{course.actors}" if staleness else ""
    size = f"{course.steps}x{course.answers}_at_{course.lr:g}"
    out = start.with_name(f"{start.name}_{name}_{size}_stale_{staleness}{answered_by}")
    train_run(
        *("demo_rl", "--init", start, "--out", out, "--seed", seed, "--rl.tasks", tasks),
        *("--language.path", start.with_name("tasks") / "language", "--rl.max-new-tokens", course.max_new_tokens),
        *("--data.global-batch-images", course.answers, "--optim.lr", course.lr),
        *("--schedule.steps", course.steps, "--checkpoint.every-steps", course.steps),
        *("--rl.max-staleness", staleness, "--rl.actors", course.actors if staleness else 0),
    )
    return out


def worths(run: Path, tasks: str, exam: Exam) -> dict[str, Worth]:
    """Return what a run or a model is worth in each task; kept beside it, in a folder `worth`.

    Errors: DataError for a task whose every prompt fails; as loading.
    """
    found = tasks_of(tasks)
    kept = {source: run.parent / "worth" / f"{run.name}_{source}_{exam.name}.json" for source in found}
    if any(not path.exists() for path in kept.values()):
        speaker = PlainSpeaker(load_joint(run))
        for source, path in kept.items():
            path.parent.mkdir(exist_ok=True)
            write_json(path, asdict(worth(speaker, found, source, exam)))
    return {source: Worth(**read_json(path)) for source, path in kept.items()}


def worth(speaker: PlainSpeaker, tasks: Mapping[str, NewTask], source: str, exam: Exam) -> Worth:
    """Ask a model the first episodes of a task that are kept for this. Errors: DataError when none is answered."""
    heard: list[Answer] = []
    engine = LocalEngine(speaker, tasks)
    engine.set_weights(0, {})
    speech = Speech(max_new_tokens=exam.max_new_tokens)
    for number in range(exam.prompts):
        seed = FIRST_UNASKED_EPISODE + number
        engine.submit(Request(f"{source}-{seed}", source, seed, exam.group, speech), heard.append)
    while engine.poll():
        continue
    answers = [answer for answer in heard if answer.outcome == "answered"]
    if not answers:
        raise DataError(f"task {source!r}: no prompt was answered, the last one because {heard[-1].reason}")
    rewards = [[sample.reward or 0.0 for sample in answer.samples] for answer in answers]
    judge = OwnVerifier(tasks)
    blind = [
        judge(Episode(source, other.request.seed, tuple(turn.text for turn in sample.turns)))
        for answer, other in zip(answers, [*answers[1:], answers[0]], strict=True)
        for sample in answer.samples
    ]
    passed = fmean(float(max(own) >= PASSED) for own in rewards)
    return Worth(fmean(reward for own in rewards for reward in own), passed, fmean(blind), len(heard) - len(answers))
