"""Measures what a corpus of 1e5 to 8e9 samples costs a process, and what 64 to 4,096 ranks send and open.

Usage: python -m tools.bench.scale [flags]

--out FILE      write the record there too
--samples LIST  sizes of the corpora, in shards of 10,000 ("1e5,1e6,1e7,1e8,8e9"); none: they are left out
--peer LIST     sizes at which streaming is measured ("1e6,1e7"); none: it is left out
--ranks LIST    worlds whose other ranks are not there ("64,256,1024,4096"); none: they are left out

Every figure is of a process that has just started, in CPU seconds of it and memory of no file beyond its imports. The
corpora have a line for every shard and rows of 64 real ones, to which the lines point in turn; plans are of 64 shares
and batches of 65,536 images. The peer gets an index.json of as many samples. Disk: 330 MB at 8e9.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cogvit.errors import ConfigError
from data_pipeline.sizing import Sizing
from data_pipeline.spec import PlanSpec
from tools.bench._corpora import write_long_corpus
from tools.bench._memory import held_mb
from tools.bench._record import flags_of, run_benchmark
from tools.corpus_cost import IMAGES_A_SHARD

PROCESSES = 8
PAIRS, WIDTH, RANKS_A_NODE = 16, 768, 8  # of the worlds
_LOOK_EVERY_S = 0.004


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = ""
    samples: str = "1e5,1e6,1e7,1e8,8e9"
    peer: str = "1e6,1e7"
    ranks: str = "64,256,1024,4096"


def spec_of_runs() -> PlanSpec:
    """Return the plan that is measured."""
    sizing = Sizing("naflex", 14, (1, 1), 1024, enlarge=False)
    return PlanSpec((), 65536, 64, 16, sizing, attention_tokens=7168)


def read_sizes(text: str) -> list[int]:
    """Return the sizes of a list. Errors: ConfigError for what is none."""
    try:
        sizes = [int(float(word)) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--samples and --peer take numbers like 1e6,1e7, not {text!r}") from None
    return [max(1, size // IMAGES_A_SHARD) for size in sizes]


def measured(module: str, *words: object) -> dict[str, Any]:
    """Return what a module prints as JSON in a process of its own, and the most that this held if it says from where.

    Its memory is looked at every few milliseconds, so what is held for less may be missed.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    most_mb = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            most_mb = max(most_mb, held_mb(process.pid))
            time.sleep(_LOOK_EVERY_S)
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    figures: dict[str, Any] = json.loads(told.splitlines()[-1])
    if "before_mb" in figures:
        figures["peak_mb"] = most_mb - figures["before_mb"]
    return figures


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line."""
    yield "# What a corpus costs a process"
    yield ""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    yield f"{date.today()}, `python -m tools.bench.scale {flags_of(arguments)}`; {cores} cores, load {load:.0f}."
    if arguments.ranks != "none":
        yield ""
        yield from of_ranks(arguments.ranks)
    if arguments.samples != "none":
        yield ""
        yield from of_samples(arguments)
    yield f"Load {os.getloadavg()[0]:.0f} at the end."


def of_ranks(worlds: str) -> Iterator[str]:
    """Yield the table of what one of many ranks does. Errors: ConfigError for worlds that are no numbers."""
    words = worlds.split(",")
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise ConfigError(f"--ranks takes numbers of at least 2 like 64,4096, not {worlds!r}")
    yield f"One rank of many whose others are not there (torch's fake process group), dp alone, {PAIRS} pairs of width"
    yield f"{WIDTH} a rank: the loss's messages, and bytes in them and in collectives; files of a save with"
    yield f"{RANKS_A_NODE} ranks a node and how many are written at a time (no byte goes between ranks); open files on"
    yield "GPUs, by the law of the groups."
    yield ""
    loss = ("group", "blocks", "messages", "collectives", "MB")
    head = ("ranks", "join CPU s", *loss, "files", "at a time", "open files", "first", "store's process")
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for word in words:
        one = measured("tools.bench._many_ranks", word)
        yield (
            f"| {int(word):,} | {one['join_s']:.2f} | {one['group']} | {one['blocks']} | {one['messages']} |"
            f" {one['collectives']} | {one['mb']:.1f} | {one['files']} | {one['writers']} | {one['open_files']} |"
            f" {one['open_files_first']:,} | {one['open_files_store']:,} |"
        )


def of_samples(arguments: Arguments) -> Iterator[str]:
    """Yield the tables of what a corpus costs."""
    yield "CPU of one process that just started, and memory of no file (RssAnon + RssShmem) beyond its imports."
    yield ""
    yield "| samples | shards | open ms | planner ms | first batch of a share s | next step ms | next window ms |"
    yield "|---|---|---|---|---|---|---|"
    memory = [
        "| samples | private MB after opening | after three batches | at the peak | PSS of 8 processes over one |"
    ]
    memory.append("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for shards in read_sizes(arguments.samples):
            directory = Path(scratch, str(shards))
            directory.mkdir()
            pattern = write_long_corpus(directory, shards, IMAGES_A_SHARD, spec_of_runs())
            one = measured("tools.bench._start", pattern)
            together = measured("tools.bench._start", pattern, PROCESSES)
            samples = f"{shards * IMAGES_A_SHARD:,}"
            yield (
                f"| {samples} | {shards:,} | {one['open_ms']:.1f} | {one['planner_ms']:.1f} | {one['batch_s']:.2f} |"
                f" {one['step_ms']:.1f} | {one['window_ms']:.1f} |"
            )
            pss = together["pss_over_one"]
            memory.append(
                f"| {samples} | {one['opened_mb']:.1f} | {one['planned_mb']:.1f} | {one['peak_mb']:.1f} | {pss:.2f} |"
            )
        yield ""
        yield from memory
        yield ""
        yield from peers(arguments.peer, Path(scratch))


def peers(sizes: str, scratch: Path) -> Iterator[str]:
    """Yield the table of the peer."""
    if sizes == "none" or find_spec("streaming") is None:
        yield "MosaicML streaming was not measured: `make bench` installs it."
        return
    yield "MosaicML streaming beside it, one process each: the dataset object is its start, its epoch's order the first"
    yield "batch. MB are RssAnon + RssShmem beyond the imports: held by who goes on to read (streaming's order of all"
    yield "samples, of which one of R ranks would hold 1/R), and at the peak, which the first rank of each node has."
    yield ""
    ours = ("ours: open + planner s", "first batch s", "MB held", "at the peak")
    head = ("samples", "streaming: start s", "order s", "MB held", "of that order", "at the peak", *ours)
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for shards in read_sizes(sizes):
        directory = scratch / f"peer{shards}"
        directory.mkdir()
        pattern = write_long_corpus(directory, shards, IMAGES_A_SHARD, spec_of_runs())
        peer = measured("tools.bench._streaming", directory / "peer", shards, IMAGES_A_SHARD)
        one = measured("tools.bench._start", pattern)
        start_s = (one["open_ms"] + one["planner_ms"]) / 1e3
        yield (
            f"| {shards * IMAGES_A_SHARD:,} | {peer['start_s']:.2f} | {peer['order_s']:.2f} | {peer['mb']:.1f} |"
            f" {peer['order_mb']:.1f} | {peer['peak_mb']:.1f} | {start_s:.3f} | {one['batch_s']:.2f} |"
            f" {one['planned_mb']:.1f} | {one['peak_mb']:.1f} |"
        )
    yield ""


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
