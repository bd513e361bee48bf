"""What frames' order and times are worth to a run on videos: exact answers with and without each of them.

usage: python -m tools.experiments.video RUN [--data PATTERN] [--seed N]

Asks every question of the held-out shards four times: as it is; with the frames of its video in a drawn order, times
staying where they were; without times; and about the next question's video.

--data PATTERN  held-out shards (default: the run's own)
--seed N        of the orders (default: 0)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cogvit.config import load_config
from cogvit.config.arguments import run_command
from cogvit.evaluation.answers import Asked, answers, exact, exams
from cogvit.model.dialog import Turn
from cogvit.training.joint import load_joint
from data_pipeline.index import load_index
from data_pipeline.token_counts import wording_of


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    data: str = ""
    seed: str = "0"


def shuffled(asked: Asked, draw: np.random.Generator) -> Asked:
    """Return a question whose images stand in another order."""
    return replace(asked, images=tuple(asked.images[place] for place in draw.permutation(len(asked.images))))


def without_times(asked: Asked) -> Asked:
    """Return a question without the texts right before its images."""
    turns = []
    for turn in asked.turns:
        follows = (*turn.parts[1:], "")
        kept = [part for part, behind in zip(turn.parts, follows, strict=True) if part is None or behind is not None]
        turns.append(Turn(turn.role, tuple(kept)))
    return replace(asked, turns=tuple(turns))


def measure(arguments: Arguments) -> int:
    """Print a row for each source of questions; returns the exit status."""
    run = Path(arguments.run)
    config, model = load_config(run / "config.json"), load_joint(run)
    draw = np.random.default_rng(int(arguments.seed))
    print("| | questions | as they are | shuffled | without times | another video |\n|---|---|---|---|---|---|")
    for exam in exams(load_index(arguments.data or config.data.eval_shards, config.data.index_dir), wording_of(config)):
        ways = (
            exam.asked,
            [shuffled(one, draw) for one in exam.asked],
            [without_times(one) for one in exam.asked],
            exam.blind(),
        )
        figures = [exact(answers(model, way), [one.right for one in way]) for way in ways]
        print(
            f"| {exam.name} | {len(exam.asked)} |", " | ".join(f"{figure:.1%}" for figure in figures), "|", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, measure))
