"""Computes the teachers' features of all training images once, with Ray, for --teachers.source store.

Usage: python -m tools.precompute_features PRESET --out DIR [flags of the trainer]

PRESET and flags are those of the run that will read the store: its shards, teachers, patch size and image sizes decide
what is stored. A shard whose file fits is left alone, so the same command goes on after an interruption, after new
shards, and redoes what a change of the teachers or the data has made stale.

The run then takes --teachers.source store --teachers.store DIR. Exit status: 0, or 2 when the configuration cannot run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.arguments import asks_for_help
from cogvit.config import RunConfig
from cogvit.errors import CogViTError, ConfigError
from cogvit.flags import load_preset, parse
from cogvit.teacher.actors import TeacherPool, connect, plan_cluster
from cogvit.teacher.store import contents_of, headers_of, is_complete, path_of, shard_name, write_shard
from cogvit.teacher.stream import FeatureRequest, FeatureSource, submit_ahead
from cogvit.teacher.zoo import fingerprint, inspect_teacher
from data_pipeline.index import Index, open_index
from data_pipeline.loader import image_of
from data_pipeline.sizing import sizing_of

Ints = NDArray[np.int64]

IMAGES_PER_REQUEST = 64


def shard_requests(index: Index, rows: Ints, grid_hw: Ints) -> Iterator[FeatureRequest]:
    """Ask for every token of some rows, in their order."""
    for start in range(0, len(rows), IMAGES_PER_REQUEST):
        chosen = rows[start : start + IMAGES_PER_REQUEST]
        samples = tuple(index.ref(int(row)) for row in chosen)
        grids = tuple((height, width) for height, width in grid_hw[chosen].tolist())
        yield FeatureRequest(samples, grids, (0,) * len(samples), mask_ratio=1.0)


@dataclass(frozen=True)
class Job:
    """What a store lacks."""

    out: Path
    index: Index
    grid_hw: Ints  # [S, 2], of every sample of the index
    rows: dict[str, Ints]  # by shard name, of the shards without a file that fits
    headers: dict[tuple[str, str], dict[str, str]]  # by teacher and shard name, what a file that fits says


def plan_job(config: RunConfig) -> Job:
    """Compare the store at config.out with what the configuration needs.

    Errors: ConfigError for teachers or shards that do not serve.
    """
    if not config.out:
        raise ConfigError("--out DIR is needed: the store")
    if not config.teachers.members:
        raise ConfigError("the preset has no teachers; take one of stage 1")
    out, index = Path(config.out), open_index(config.data, config.data.shards)
    fingerprints = {member.name: fingerprint(inspect_teacher(member.path)) for member in config.teachers.members}
    grid_hw = sizing_of(config).grids(index.rows["height_px"], index.rows["width_px"])
    headers = headers_of(fingerprints, contents_of(index.shards, index.rows, grid_hw), config.teachers.precision)
    stale = {shard for (name, shard), header in headers.items() if not is_complete(path_of(out, name, shard), header)}
    names = [shard_name(shard) for shard in index.shards]
    rows = {name: np.flatnonzero(index.rows["shard"] == n) for n, name in enumerate(names) if name in stale}
    return Job(out, index, grid_hw, rows, headers)


def run_job(job: Job, source: FeatureSource) -> None:
    """Compute and write what is missing, with a line of progress for each shard.

    Errors: DataError for a shard that cannot be read; those of the source.
    """
    total, done, start_s = sum(map(len, job.rows.values())), 0, time.monotonic()
    for number, (shard, rows) in enumerate(job.rows.items(), start=1):
        num_bytes = _store_shard(job, source, shard)
        done += len(rows)
        images_per_s = done / (time.monotonic() - start_s)
        print(
            f"[{number}/{len(job.rows)}] {shard}: {len(rows):,} images, {num_bytes / 2**20:,.1f} MiB,"
            f" {images_per_s:,.0f} images/s, {(total - done) / images_per_s:,.0f} s left",
            flush=True,
        )


def _store_shard(job: Job, source: FeatureSource, shard: str) -> int:
    """Write the features of one shard for every teacher; returns their bytes."""
    rows = job.rows[shard]
    found: dict[str, list[Tensor]] = {teacher: [] for teacher in source.dims}
    for _, handle in submit_ahead(shard_requests(job.index, rows, job.grid_hw), source.submit, in_flight=2):
        for teacher, features in source.result(handle).items():
            found[teacher].append(features)
    num_tokens = job.grid_hw[rows].prod(axis=1).tolist()
    num_bytes = 0
    for teacher, pieces in found.items():
        path, header = path_of(job.out, teacher, shard), job.headers[teacher, shard]
        dtype = torch.bfloat16 if header["precision"] == "bf16" else torch.float32  # the teachers' own, so exact
        sample_ids = job.index.rows["sample_id"][rows].tolist()
        write_shard(path, header, sample_ids, torch.cat(pieces).to(dtype).split(num_tokens))
        num_bytes += path.stat().st_size
    return num_bytes


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        config = parse(load_preset(argv[0]), argv[1:])
        job, teachers = plan_job(config), config.teachers
        print(f"{len(job.index.shards) - len(job.rows)} of {len(job.index.shards)} shards are in {job.out} already")
        if job.rows:
            with connect(plan_cluster(teachers.ray_address), len(teachers.members) * teachers.actors_per_teacher):
                run_job(job, TeacherPool(teachers, partial(image_of, flip=False)))
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
