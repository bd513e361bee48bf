"""Computes the teachers' features of all training images once, with Ray, for --teachers.source store.

usage: python -m tools.precompute_features PRESET --out DIR [--dtype fp32|bf16|fp16|uint8] [--tokens all|summary]
           [--part I/N] [--dry-run] [flags of the trainer]

PRESET and flags are those of the run that will read the store: its shards (the held-out ones too where it evaluates),
teachers, patch size and image sizes decide what is stored. A shard whose file fits is left alone, so the same command
goes on after an interruption and after new shards, or adds what a change of the data has made stale.

  --dtype  how features lie on disk; by default in the teachers' precision, which is exact. uint8 has a scale for every
           image and channel.
  --tokens all (default): every patch, and summaries of the teachers whose summary_weight is not 0; summary: one feature
           an image of every teacher (CLS token, pooled output, or mean of the patches).

  --part I/N  every N-th shard, from the I-th on, I from 0 to N - 1: many jobs fill one store (launch/precompute.sh as
           an array). Jobs may overlap too: a shard is held by who writes it, and the others leave it out.
  --dry-run  say what lacks and what it will take, and start nothing.

python -m tools.verify_features DIR reads a whole store and names what is damaged.

The run then takes --teachers.source store --teachers.store DIR. Exit status: 0, or 2 when the configuration cannot run.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cogvit.config import RunConfig, TeachersConfig
from cogvit.config.arguments import asks_for_help, take_flag
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_recipe, read_run
from cogvit.stages.distill_targets import makers_of
from cogvit.stages.stored_shards import StoredShards, check_sets, stored_sets
from cogvit.teacher.actors import TeacherPool, connect, plan_cluster
from cogvit.teacher.encoding import ROW_DTYPES, StoreDtype
from cogvit.teacher.room import cpus_of
from cogvit.teacher.shard import shard_writer
from cogvit.teacher.store import (
    Maker,
    claimed,
    dtype_of,
    header_of,
    is_complete,
    path_of,
    writing,
)
from cogvit.teacher.stream import (
    FeatureRequest,
    Features,
    FeatureSource,
    answer_bytes,
    is_summary,
    rows_of_images,
    submit_ahead,
)
from data_pipeline.cache import cache_of
from data_pipeline.index import Index
from data_pipeline.loader import image_of
from tools.index_shards import read_part

Ints = NDArray[np.int64]

IMAGES_PER_REQUEST = 64


def shard_requests(index: Index, rows: Ints, grid_hw: Ints, max_tokens: int) -> Iterator[FeatureRequest]:
    """Ask for every token of some rows, in their order; grid_hw is [len(rows), 2].

    A request has up to IMAGES_PER_REQUEST images and max_tokens patches; one image alone may have more.
    """
    end_S = np.cumsum(grid_hw.prod(axis=1))  # patches up to the end of each image
    start = 0
    while start < len(rows):
        before = int(end_S[start - 1]) if start else 0
        fitting = int(np.searchsorted(end_S, before + max_tokens, side="right"))
        here = slice(start, min(max(fitting, start + 1), start + IMAGES_PER_REQUEST))
        samples = tuple(index.ref(int(row)) for row in rows[here])
        grids = tuple((height, width) for height, width in grid_hw[here].tolist())
        yield FeatureRequest(samples, grids, (0,) * len(samples), mask_ratio=1.0)
        start = here.stop


@dataclass(frozen=True)
class Shard:
    """A data shard of which the store lacks features."""

    path: str
    contents: str
    of: StoredShards
    number: int
    lacking: tuple[str, ...]  # the teachers whose features of it are to be made

    @property
    def index(self) -> Index:
        """Where its images are."""
        return self.of.index

    @property
    def rows(self) -> Ints:
        """Its images, as rows of the index."""
        return self.of.rows(self.number)

    @property
    def grid_hw(self) -> Ints:
        """The grids of its images, [len(rows), 2]."""
        return self.of.grids(self.rows)


@dataclass(frozen=True)
class Job:
    """What a store lacks."""

    out: Path
    makers: dict[str, Maker]
    dtype: StoreDtype
    contents: dict[str, str]  # of every shard of the run
    shards: tuple[Shard, ...]  # of which some teacher's file lacks
    max_tokens: int  # of a request

    @property
    def lacking(self) -> list[str]:
        """The teachers of whose features some shard has no file."""
        return [name for name in self.makers if any(name in shard.lacking for shard in self.shards)]

    def lacking_of(self, path: str, contents: str) -> tuple[str, ...]:
        """Return the teachers of whose features for a shard the store has no whole file by now."""
        return tuple(
            name
            for name, maker in self.makers.items()
            if not is_complete(
                path_of(self.out, name, path, contents), header_of(maker, dtype_of(name, self.dtype), contents)
            )
        )


def check_job(config: RunConfig) -> None:
    """Check a configuration by the rules of the run that will read the store, whose views of an image may differ.

    Errors: ConfigError.
    """
    if not config.out:
        raise ConfigError("--out DIR is needed: the store")
    if not config.teachers.members:
        raise ConfigError("the preset has no teachers; take one of stage 1")
    plain = replace(config.data, flip=False, crop=1.0, color=0.0)
    run = replace(config, data=plain, teachers=replace(config.teachers, source="store", store=config.out))
    check_recipe(run)


def plan_job(config: RunConfig, dtype: StoreDtype | None = None, part: tuple[int, int] = (0, 1)) -> Job:
    """Compare the store at config.out with what the configuration needs; no dtype is the teachers' precision.

    part: which of so many parts of the shards.
    Errors: ConfigError for teachers or shards that do not serve.
    """
    check_job(config)
    out, makers = Path(config.out), makers_of(config.teachers)
    job = Job(out, makers, dtype or config.teachers.precision, {}, (), config.data.tokens_per_pack)
    sets = stored_sets(config, evaluates=config.eval.every_steps > 0)
    check_sets(sets)
    found: dict[str, str] = {}
    shards: dict[tuple[str, str], Shard] = {}
    for one in sets:
        for number in one.numbers(part):
            path, contents = one.index.corpus.shard_path(number), one.contents(number) or ""
            found[path] = contents
            if lacking := job.lacking_of(path, contents):
                shards[path.rpartition("/")[2], contents] = Shard(path, contents, one, number, lacking)
    return replace(job, contents=found, shards=tuple(shards.values()))


def run_job(job: Job, source: FeatureSource, in_flight: int = 2) -> None:
    """Compute and write what is missing, with a line of progress for each shard and in_flight requests ahead.

    Errors: ConfigError when the store is another job's or other teachers'; DataError for a shard that cannot be read or
    a disk that is full; those of the source.
    """
    with writing(job.out, job.makers, job.dtype), ExitStack() as at_the_end:
        # Another job may have made some since this one was planned.
        by_now = [replace(shard, lacking=job.lacking_of(shard.path, shard.contents)) for shard in job.shards]
        shards = [shard for shard in by_now if shard.lacking]
        total, done, start_s = sum(len(shard.rows) for shard in shards), 0, time.monotonic()
        held: dict[int, ExitStack] = {}

        def asked() -> Iterator[tuple[int, FeatureRequest]]:
            for number, shard in enumerate(shards):
                held[number] = at_the_end.enter_context(ExitStack())
                ours = held[number].enter_context(claimed(job.out, shard.path, shard.contents))
                if not ours or not job.lacking_of(shard.path, shard.contents):  # another job makes it, or just did
                    held[number].close()
                else:
                    for request in shard_requests(shard.index, shard.rows, shard.grid_hw, job.max_tokens):
                        yield number, request

        under_way = submit_ahead(asked(), lambda pair: source.submit(pair[1]), in_flight)  # across the ends of shards
        for number, answers in groupby(under_way, key=lambda answer: answer[0][0]):
            shard = shards[number]
            with held[number]:
                found = ((request, source.result(handle)) for (_, request), handle in answers)
                num_bytes = _store_shard(job, shard, found)
            done += len(shard.rows)
            images_per_s = done / (time.monotonic() - start_s)
            print(
                f"[{number + 1}/{len(shards)}] {shard.path}: {len(shard.rows):,} images,"
                f" {num_bytes / 2**20:,.1f} MiB, {images_per_s:,.0f} images/s,"
                f" {(total - done) / images_per_s:,.0f} s left",
                flush=True,
            )


def _store_shard(job: Job, shard: Shard, answers: Iterable[tuple[FeatureRequest, Features]]) -> int:
    """Write the features of one shard, for every teacher whose it lacks, as they come; returns their bytes."""
    num_tokens = shard.grid_hw.prod(axis=1).tolist()
    sample_ids = shard.index.take(shard.rows)["sample_id"].tolist()
    paths = {name: path_of(job.out, name, shard.path, shard.contents) for name in shard.lacking}
    with ExitStack() as stack:
        appends = {
            name: stack.enter_context(
                shard_writer(
                    path,
                    header_of(job.makers[name], dtype_of(name, job.dtype), shard.contents),
                    sample_ids,
                    [1] * len(num_tokens) if is_summary(name) else num_tokens,
                    job.makers[name].dim,
                )
            )
            for name, path in paths.items()
        }
        for request, features in answers:
            for name, append in appends.items():
                for feature in features[name].split(rows_of_images(name, request)):
                    append(feature)
    return sum(path.stat().st_size for path in paths.values())


def check_room(job: Job) -> str:
    """Return what the job will write, in words. Errors: ConfigError when its disk has no room for it."""
    num_bytes = 0
    for shard in job.shards:
        tokens, images = int(shard.grid_hw.prod(axis=1).sum()), len(shard.rows)
        for name in shard.lacking:
            row_bytes = job.makers[name].dim * ROW_DTYPES[dtype_of(name, job.dtype)].itemsize
            num_bytes += row_bytes * (images if is_summary(name) else tokens)
    there = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(there).free
    said = (
        f"{len(job.shards):,} shards take {num_bytes / 1e9:,.1f} GB in {job.dtype}; {free_bytes / 1e9:,.1f} GB are free"
    )
    if num_bytes > free_bytes:
        raise ConfigError(
            f"the features of {said} at --out {job.out}; take another disk, --dtype uint8, --tokens summary, fewer"
            " --data.shards, or --teachers.source online"
        )
    return said


def asked_of(teachers: TeachersConfig, job: Job) -> TeachersConfig:
    """Return the teachers without those of whom nothing lacks."""
    members = (one for one in teachers.members if any(one.name + part in job.lacking for part in one.parts))
    return replace(teachers, members=tuple(members))


def idle_actors(teachers: TeachersConfig, job: Job) -> str:
    """Return what is to be said where teachers.max_in_flight_bytes is too small for every actor to work, or nothing."""
    shard = job.shards[0]
    request = next(shard_requests(shard.index, shard.rows, shard.grid_hw, job.max_tokens))
    request_bytes = answer_bytes(request, {name: job.makers[name].dim for name in job.lacking}, teachers.precision)
    busy = max(1, teachers.max_in_flight_bytes // request_bytes)
    if busy >= teachers.actors_per_teacher:
        return ""
    return (
        f"only {busy} of {teachers.actors_per_teacher} actors of a teacher have work at a time:"
        f" --teachers.max-in-flight-bytes {teachers.max_in_flight_bytes} holds {busy} requests of {request_bytes:,}"
        f" bytes; {2 * teachers.actors_per_teacher * request_bytes} keeps all of them busy"
    )


def take_dtype(argv: list[str]) -> tuple[StoreDtype | None, list[str]]:
    """Take --dtype out of a command line. Errors: ConfigError for another dtype than those that are stored."""
    value, words = take_flag(argv, "--dtype")
    for dtype in get_args(StoreDtype):
        if value == dtype:
            return dtype, words
    if value is not None:
        raise ConfigError(f"--dtype {value} is none of {', '.join(get_args(StoreDtype))}")
    return None, words


def of_summaries(config: RunConfig) -> RunConfig:
    """Return a run that regresses the summary of every teacher and nothing else."""
    members = tuple(replace(member, weight=0.0, summary_weight=1.0) for member in config.teachers.members)
    return replace(config, teachers=replace(config.teachers, members=members))


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        dtype, words = take_dtype(argv[1:])
        tokens, words = take_flag(words, "--tokens")
        if tokens not in (None, "all", "summary"):
            raise ConfigError(f"--tokens {tokens} is none of all, summary")
        part, words = take_flag(words, "--part")
        dry, words = "--dry-run" in words, [word for word in words if word != "--dry-run"]
        config = read_run(argv[0], words)
        config = of_summaries(config) if tokens == "summary" else config
        job = plan_job(config, dtype, read_part(part or "") or (0, 1))
        teachers = asked_of(config.teachers, job)
        print(f"{len(job.contents) - len(job.shards)} of {len(job.contents)} shards are in {job.out} already")
        if job.shards:
            print(check_room(job))
        if job.shards and not dry:
            if note := idle_actors(teachers, job):
                print(note)
            with connect(plan_cluster(teachers.ray_address), cpus_of(teachers)):
                pool = TeacherPool(teachers, partial(image_of, cache=cache_of(config.data)))
                run_job(job, pool, in_flight=2 * teachers.actors_per_teacher)
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
