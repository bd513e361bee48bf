"""Indexes webdataset shards for training: one pass over each tar and the headers of its images, no decoding.

Usage: python -m tools.index_shards PATTERN [flags]

PATTERN is a glob, a brace range ({00000..00012}) or a directory of .tar files, local or an fsspec URL, or a brace range
of commands that print one (pipe:aws s3 cp s3://bucket/{00000..00012}.tar -); quote it. A remote shard is read whole,
through a temporary file. Nothing tells when that of a pipe changed: remove its index to make it anew.
A sample is KEY.png, .jpg, .webp, .avif, .jp2, .gif, .bmp or .tif with captions in KEY.json or KEY.txt. A json holds
them as `captions` or `caption`: a text, a list of texts, COCO's [{"raw": ...}], or any of these by language,
{"en": [...], "zh": [...]}.

--index-dir DIR      write SHARD.parquet there instead of beside each shard
--source NAME        source of the samples whose json names none, for data.mixture ("default")
--caption-field NAME the field of a json that holds the captions; pass the run the same as --data.caption-field
--source-field NAME  the field of a json that names the source ("source"); a field that no json has: all are of --source
--report FILE        read the shards again and write what is left out, a line {"shard", "name", "reason"} each
--min-side-px N      leave out images with a shorter side (8)
--max-aspect X       leave out images whose longer side is more than X times the shorter (6)
--max-pixels N       leave out images with more pixels (89478485)
--captions required  leave out images without a caption (any)
--workers N          index N shards at a time, in Ray workers (1: in this process)
--ray-address H:P    the Ray cluster of the workers; one of its own on this machine if not given

--part I/N           index the I-th of N parts of the shards, I from 0 to N - 1, on a machine of its own
--merge N            put N parts together, without a look at the shards

At the end the indexes of all shards become one corpus file, which is what a run opens: corpus-*.cogvit in the directory
that all shards are below, or in --index-dir. It belongs to the pattern: another pattern over the same shards has one of
its own, which takes a moment. A shard whose index fits is left alone and a corpus file is appended to, so the same
command goes on after an interruption and after new shards.
What is left out is counted and printed, with the reason. A shard that is damaged or cannot be read is named, and the
others are indexed. Exit status: 0, or 2 for shards that cannot be indexed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError, DataError
from data_pipeline.corpus import corpus_place
from data_pipeline.decode import MAX_PIXELS
from data_pipeline.index import DEFAULT_SOURCE, ShardReport, index_shard, load_index, shards_to_index
from data_pipeline.merge import Entry, merge, merge_parts
from data_pipeline.rules import Rules
from data_pipeline.scan import scan_shard
from data_pipeline.server import run_tasks
from data_pipeline.shards import whole_shard


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line."""

    pattern: str
    index_dir: str = ""
    source: str = DEFAULT_SOURCE
    min_side_px: str = str(Rules.min_side_px)
    max_aspect: str = str(Rules.max_aspect)
    max_pixels: str = str(Rules.max_pixels)
    captions: str = Rules.captions
    part: str = ""
    merge: str = ""
    caption_field: str = Rules.caption_field
    source_field: str = Rules.source_field
    report: str = ""
    workers: str = "1"
    ray_address: str = ""


def read_rules(arguments: Arguments) -> Rules:
    """Return the rules of a command line. Errors: ConfigError for what is no number, no choice, or out of bounds."""
    if arguments.captions not in ("any", "required"):
        raise ConfigError(f"--captions {arguments.captions} must be any or required")
    try:
        rules = Rules(
            int(arguments.min_side_px),
            float(arguments.max_aspect),
            int(arguments.max_pixels),
            "required" if arguments.captions == "required" else "any",
            arguments.caption_field,
            arguments.source_field,
        )
    except ValueError as error:
        raise ConfigError(f"--min-side-px, --max-aspect and --max-pixels take numbers: {error}") from None
    if not (rules.min_side_px >= 1 and rules.max_aspect >= 1.0):
        raise ConfigError(f"--min-side-px {rules.min_side_px} and --max-aspect {rules.max_aspect} must be at least 1")
    if not 1 <= rules.max_pixels <= MAX_PIXELS:
        raise ConfigError(f"--max-pixels {rules.max_pixels} must be 1 to {MAX_PIXELS}: larger images are never decoded")
    return rules


def index_or_tell(shard: str, index_dir: str, source: str, rules: Rules) -> ShardReport:
    """Index one shard; one that cannot be is reported, so that the others are indexed."""
    try:
        return index_shard(shard, index_dir, source, rules)
    except DataError as error:
        return ShardReport(shard, 0, {}, reused=False, made_from=0, failure=str(error))


def index_all(arguments: Arguments, shards: tuple[str, ...]) -> Iterator[ShardReport]:
    """Index shards, in this process or several at a time; yields each when it is done."""
    if not arguments.workers.isdecimal() or int(arguments.workers) < 1:
        raise ConfigError(f"--workers {arguments.workers} must be a number of 1 or more")
    workers, rules = int(arguments.workers), read_rules(arguments)
    index_one = partial(index_or_tell, index_dir=arguments.index_dir, source=arguments.source, rules=rules)
    if workers == 1:
        yield from map(index_one, shards)
        return
    from cogvit.teacher.actors import connect, plan_cluster  # with transformers, which takes seconds

    with connect(plan_cluster(arguments.ray_address), workers):
        yield from run_tasks(index_one, shards, in_flight=2 * workers)


def index_shards(arguments: Arguments) -> int:
    """Index the shards with a line of progress for each, or a bar on a terminal, then print what they hold."""
    place = corpus_place(arguments.pattern, arguments.index_dir)
    if arguments.merge:
        if not arguments.merge.isdecimal() or int(arguments.merge) < 1 or arguments.part:
            raise ConfigError(f"--merge {arguments.merge} must be the number of parts, and goes without --part")
        print(merge_parts(place, int(arguments.merge)))
        return _tell(arguments)
    shards = shards_to_index(arguments.pattern, arguments.index_dir)
    part = read_part(arguments.part)
    if part is not None:
        shards = shards[len(shards) * part[0] // part[1] : len(shards) * (part[0] + 1) // part[1]]
    problems: Counter[str] = Counter()
    failures: list[str] = []
    made_from: dict[str, int] = {}
    on_terminal = sys.stderr.isatty()
    reports = index_all(arguments, shards)
    for done, report in enumerate(tqdm(reports, total=len(shards), unit="shard", disable=not on_terminal), start=1):
        problems.update(report.problems)
        made_from[report.shard] = report.made_from
        if report.failure:
            failures.append(report.failure)
            tqdm.write(f"[{done}/{len(shards)}] {report.failure}")
        elif not on_terminal:
            state = "fits" if report.reused else "indexed"
            name = report.shard.rpartition("/")[2]
            print(f"[{done}/{len(shards)}] {name}: {report.num_images:,} images, {state}", flush=True)
    for reason, count in problems.most_common():
        print(f"left out: {count:,} x {reason}")
    if arguments.report:
        write_report(arguments, shards)
    if failures:
        raise DataError(f"{len(failures)} of {len(shards)} shards cannot be indexed: {failures[0]}")
    print(merge(place, [Entry(shard, made_from[shard]) for shard in shards], arguments.index_dir, part))
    return _tell(arguments) if part is None else 0


def _tell(arguments: Arguments) -> int:
    print(load_index(arguments.pattern, arguments.index_dir, duplicates="drop").describe())
    return 0


def read_part(text: str) -> tuple[int, int] | None:
    """Return which of how many parts `I/N` is; None for all. Errors: ConfigError."""
    if not text:
        return None
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise ConfigError(f"--part {text} must be I/N with I from 0 to N - 1")
    return int(number), int(parts)


def write_report(arguments: Arguments, shards: tuple[str, ...]) -> None:
    """Name every member and sample that is left out, with the reason. Errors: ConfigError when it cannot be written."""
    try:
        with open(arguments.report, "w") as report:
            for shard in tqdm(shards, desc="report", unit="shard", disable=not sys.stderr.isatty()):
                for name, reason in left_out_of(shard, arguments.source, read_rules(arguments)):
                    report.write(json.dumps({"shard": shard, "name": name, "reason": reason}) + "\n")
    except OSError as error:
        raise ConfigError(f"--report {arguments.report} cannot be written: {error.strerror}") from None
    print(f"what is left out: {arguments.report}")


def left_out_of(shard: str, source: str, rules: Rules) -> list[tuple[str, str]]:
    """Return names and reasons; for a shard that is not read at all the reason alone."""
    try:
        with whole_shard(shard) as (file, _):
            return scan_shard(shard, file, source, rules)[1].named
    except DataError as error:
        return [("", str(error))]


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return run_command(argv, __doc__ or "", Arguments, index_shards)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
