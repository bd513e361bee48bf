"""Writes the report of a series of runs: one HTML file that opens without a network.

usage: python -m cogvit.report RUN [RUN ...] [flags]

--out FILE         the report; by default report.html in the last RUN
--evaluation FILE  the figures that python -m cogvit.evaluate --out FILE wrote
--data PATTERN     indexed held-out shards for the pictures; by default those of each run
--index-dir DIR    where their indexes lie; by default as in the run, or beside the shards
--follow           serve the page on this machine while the runs go on, without pictures, instead of writing it
--port N           of --follow (default: 8642; 0: a free one)

Curves, throughput, pictures of patch features, what is found or said of held-out images or in new episodes (in the last
run of a stage), figures, configurations and versions. A run whose checkpoint or held-out shards are missing gets no
pictures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from cogvit import checkout  # noqa: F401  before what lies beside cogvit
from cogvit.config import load_config
from cogvit.config.arguments import run_command
from cogvit.errors import CogViTError, ConfigError
from cogvit.evaluation.examples import Example, feature_picture
from cogvit.evaluation.results import read_evaluation
from cogvit.evaluation.subject import load_subject
from cogvit.report.live import REFRESH_S, page_server, serve
from cogvit.report.page import report_page, write_report
from cogvit.stages import stage_of
from cogvit.training.restore import is_run


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    runs: tuple[str, ...]
    out: str = ""
    evaluation: str = ""
    data: str = ""
    index_dir: str = ""
    follow: bool = False
    port: str = "8642"


def report(arguments: Arguments) -> int:
    """Draw the pictures and write the report; returns the exit status."""
    if arguments.follow:
        serve(live_server(arguments))
        return 0
    evaluation = read_evaluation(Path(arguments.evaluation)) if arguments.evaluation else {}
    pictures: dict[str, bytes] = {}
    examples: dict[str, list[Example]] = {}
    runs = [Path(run) for run in arguments.runs]
    for run in runs:
        try:
            drawn, shown = pictures_of(run, arguments)
        except CogViTError as error:
            if arguments.data:
                raise
            print(f"no pictures of {run}: {error}", file=sys.stderr)
            continue
        pictures |= drawn
        examples |= shown
    out = Path(arguments.out) if arguments.out else runs[-1] / "report.html"
    write_report(out, runs, evaluation, pictures, examples)
    print(out)
    return 0


def pictures_of(run: Path, arguments: Arguments) -> tuple[dict[str, bytes], dict[str, list[Example]]]:
    """Return the pictures of a run or an export by their captions, and its examples by what they are called.

    Errors: CheckpointError, ConfigError or DataError where a checkpoint or held-out shards are missing.
    """
    config = load_config(run / "config.json") if is_run(run) else None
    stage = None if config is None else stage_of(config)
    if stage is not None and config is not None and not arguments.data and (shown := stage.episodes(run, config)):
        return {}, {stage.shows: shown}
    subject, pictures = load_subject(run, arguments.data, arguments.index_dir), dict[str, bytes]()
    if len(subject.heldout):  # and not videos or texts alone
        caption = f"{run.name}: held-out images and their patch features; color is the first three principal"
        pictures[f"{caption} components"] = feature_picture(subject)
    shown = [] if stage is None else stage.examples(subject)
    return pictures, {} if stage is None or not shown else {stage.shows: shown}


def live_server(arguments: Arguments) -> ThreadingHTTPServer:
    """Return the server of --follow. Errors: ConfigError for a port that is no number or taken, or no run."""
    runs = [Path(run) for run in arguments.runs]
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run} does not exist; start the run first, or mind its --out")
    if not arguments.port.isdecimal() or int(arguments.port) > 65535:
        raise ConfigError(f"--port {arguments.port} is no port; ports end at 65535")

    def page() -> str:
        known = arguments.evaluation and Path(arguments.evaluation).exists()
        return report_page(runs, read_evaluation(Path(arguments.evaluation)) if known else {}, {}, refresh_s=REFRESH_S)

    return page_server(page, int(arguments.port))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, report))
