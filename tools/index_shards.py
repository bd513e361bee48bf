"""Indexes webdataset shards for training: one pass over each tar and the headers of its images, no decoding.

Usage: python -m tools.index_shards PATTERN [--index-dir DIR] [--source NAME]

PATTERN is a glob, a brace range ({00000..00012}) or a directory of .tar files, local or an fsspec URL; quote it.
A sample is KEY.png, .jpg, .jpeg or .webp with captions in KEY.json ({"captions": {"en": [...], "zh": [...]}}, or
{"caption": ...} as img2dataset writes it) or in KEY.txt.

--index-dir DIR   write SHARD.parquet there instead of beside each shard
--source NAME     source of the samples whose json names none, for data.mixture ("default")

A shard whose index fits is left alone, so the same command goes on after an interruption and after new shards.
What cannot be used is counted and printed, with the reason. Exit status: 0, or 2 for shards that cannot be indexed.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace

from cogvit.arguments import asks_for_help
from cogvit.errors import CogViTError, ConfigError
from data_pipeline.index import DEFAULT_SOURCE, build_index, load_index
from data_pipeline.shards import expand_shards


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line."""

    pattern: str = ""
    index_dir: str = ""
    source: str = DEFAULT_SOURCE


def read_arguments(argv: list[str]) -> Arguments:
    """Read the command line. Errors: ConfigError for an unknown flag, a missing value or no PATTERN."""
    arguments, words = Arguments(), [part for word in argv for part in _split(word)]
    while words:
        word = words.pop(0)
        if word in ("--index-dir", "--source"):
            if not words or not words[0]:
                raise ConfigError(f"{word} needs a value; see --help")
            arguments = replace(arguments, **{word[2:].replace("-", "_"): words.pop(0)})
        elif word.startswith("-") or arguments.pattern:
            raise ConfigError(f"unexpected argument {word!r}; quote PATTERN, and see --help")
        else:
            arguments = replace(arguments, pattern=word)
    if not arguments.pattern:
        raise ConfigError("PATTERN is missing: a glob, a brace range or a directory of shards; see --help")
    return arguments


def _split(word: str) -> list[str]:
    """Take --flag=value apart."""
    return word.split("=", 1) if word.startswith("--") else [word]


def index_shards(arguments: Arguments) -> None:
    """Index the shards with a line of progress for each, then print what they hold."""
    total = len(expand_shards(arguments.pattern))
    problems: Counter[str] = Counter()
    on_terminal = sys.stdout.isatty()
    for done, report in enumerate(build_index(arguments.pattern, arguments.index_dir, arguments.source), start=1):
        problems.update(report.problems)
        state = "fits" if report.reused else "indexed"
        line = f"[{done}/{total}] {report.shard.rpartition('/')[2]}: {report.num_images:,} images, {state}"
        print(f"\r\033[K{line}" if on_terminal else line, end="" if on_terminal else "\n", flush=True)
    if on_terminal:
        print()
    for reason, count in problems.most_common():
        print(f"left out: {count:,} x {reason}")
    print(load_index(arguments.pattern, arguments.index_dir).describe())


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        index_shards(read_arguments(argv))
        return 0
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
