"""Writes the report of a series of runs: one HTML file that opens without a network.

usage: python -m cogvit.report RUN [RUN ...] [flags]

--out FILE         the report; by default report.html in the last RUN
--evaluation FILE  the figures that python -m cogvit.evaluate --out FILE wrote
--data PATTERN     indexed held-out shards for the pictures; by default those of each run
--index-dir DIR    where their indexes lie; by default as in the run, or beside the shards

Curves, throughput, pictures of patch features, retrieval examples (of the last stage-2 run), figures, configurations
and versions. A run whose checkpoint or held-out shards are missing gets no pictures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cogvit import checkout  # noqa: F401  before what lies beside cogvit
from cogvit.config.arguments import run_command
from cogvit.errors import CogViTError
from cogvit.evaluation.examples import Example, feature_picture
from cogvit.evaluation.results import read_evaluation
from cogvit.evaluation.subject import load_subject
from cogvit.report.page import write_report
from cogvit.stages import stage_of


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    runs: tuple[str, ...]
    out: str = ""
    evaluation: str = ""
    data: str = ""
    index_dir: str = ""


def report(arguments: Arguments) -> int:
    """Draw the pictures and write the report; returns the exit status."""
    evaluation = read_evaluation(Path(arguments.evaluation)) if arguments.evaluation else {}
    pictures: dict[str, bytes] = {}
    examples: list[Example] = []
    runs = [Path(run) for run in arguments.runs]
    for run in runs:
        try:
            subject = load_subject(run, arguments.data, arguments.index_dir)
        except CogViTError as error:
            if arguments.data:
                raise
            print(f"no pictures of {run}: {error}", file=sys.stderr)
            continue
        caption = f"{run.name}: held-out images and their patch features; color is the first three principal components"
        pictures[caption] = feature_picture(subject)
        if subject.config is not None:
            examples = stage_of(subject.config).examples(subject) or examples
    out = Path(arguments.out) if arguments.out else runs[-1] / "report.html"
    write_report(out, runs, evaluation, pictures, examples)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, report))
