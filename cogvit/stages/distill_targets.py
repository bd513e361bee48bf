"""Stage 1's targets, put together: the teachers or their store, who asks them, and what standardizes the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cogvit.config import RunConfig, TeachersConfig
from cogvit.errors import CogViTError
from cogvit.parallel.mesh import Mesh
from cogvit.stages.stored_shards import check_sets, stored_sets
from cogvit.teacher.actors import TeacherPool
from cogvit.teacher.room import ALONE, Asker
from cogvit.teacher.standardize import Stats, fit_stats, load_stats, save_stats
from cogvit.teacher.store import Maker, StoreFeatures
from cogvit.teacher.stream import FeatureRequest, FeatureSource, FirstThen, request_of
from cogvit.teacher.targets import Targets
from cogvit.teacher.zoo import fingerprint, inspect_teacher
from data_pipeline.augment import augmentation_of
from data_pipeline.cache import cache_of
from data_pipeline.index import Index
from data_pipeline.loader import image_of, step_batches
from data_pipeline.stream import stream_batches
from data_pipeline.topology import topology_of

_LINE_EVERY_S = 10.0


def makers_of(teachers: TeachersConfig) -> dict[str, Maker]:
    """Say who computes what is regressed, by its name. Errors: ConfigError for what is no teacher."""
    makers: dict[str, Maker] = {}
    for member in teachers.members:
        spec = inspect_teacher(member.path, member.layer)
        maker = Maker(fingerprint(spec), teachers.precision, spec.dim)
        makers |= {member.name + part: maker for part in member.parts}
    return makers


def shared_targets(config: RunConfig, train: Index | None, held_out: Index | None, mesh: Mesh) -> Targets:
    """Return where targets come from: one rank of each model replica asks and shares the answers with its replica.

    Errors: ConfigError or DataError, on all ranks, for teachers, a store or statistics that do not serve.
    """
    makers = mesh.from_writer(lambda: makers_of(config.teachers))
    on_gpu = mesh.device.type == "cuda"
    gpus = frozenset(mesh.gather(str(torch.cuda.get_device_properties(mesh.device).uuid) if on_gpu else "cpu"))
    source, failure = None, None
    try:
        if mesh.tp_rank == 0 and mesh.pp_rank == 0:
            asker = Asker(mesh.dp_rank, mesh.dp_size, gpus)
            source = open_source(config, makers, asker, evaluates=held_out is not None)
    except CogViTError as error:
        failure = error
    mesh.raise_together(failure)
    return _standardized(config, train, mesh, source, makers)


def open_source(
    config: RunConfig, makers: dict[str, Maker], asker: Asker = ALONE, *, evaluates: bool = False
) -> FeatureSource:
    """Open the store for a run's shards, the actors on the cluster that this process is in, or both.

    asker: who asks; the first of several looks whether the store has every shard. evaluates: on the held-out shards.
    Errors: ConfigError names what differs.
    """
    teachers, store = config.teachers, None
    if teachers.source != "online":
        sets = stored_sets(config, evaluates=evaluates)
        store = StoreFeatures(Path(teachers.store), makers, *sets)
        if asker.number == 0:
            check_sets(sets)
    if store is not None and teachers.source == "store":
        if asker.number == 0:
            store.require_all()
        return store
    augmentation, cache = augmentation_of(config.data), cache_of(config.data)
    pool = TeacherPool(teachers, partial(image_of, augmentation=augmentation, cache=cache), asker)
    return pool if store is None else FirstThen(store, pool)


def sample_requests(config: RunConfig, index: Index | None) -> Generator[FeatureRequest]:
    """Ask for all features of the packs of the run's plan, or of its stream, from its first step, without end."""
    # On one stage, so that the packs, and with them the statistics, do not depend on the layout.
    alone = replace(config, parallel=replace(config.parallel, pp=1))
    seat = replace(topology_of(["alone"], config.data.canonical_shares).seat(0), decodes=None)
    batches = (
        stream_batches(alone, seat, None, reads="images")
        if index is None
        else step_batches(index, alone, seat, None, reads="images")
    )
    with closing(batches):
        for step in batches:
            yield from (request_of(batch, 1.0) for batch in step.micro)


def fit_sample(
    config: RunConfig,
    train: Index | None,
    source: FeatureSource,
    fingerprints: Mapping[str, str],
    num_images: int,
) -> dict[str, Stats]:
    """Fit the teachers' statistics on the images that the run's plan begins with, an epoch at most.

    Errors: as fit_stats.
    """
    if train is not None:
        num_images = min(num_images, len(train))
    with closing(sample_requests(config, train)) as requests:
        return fit_stats(source, _counted(requests, num_images), fingerprints, config.teachers.standardize)


def _counted(requests: Iterable[FeatureRequest], num_images: int) -> Iterator[FeatureRequest]:
    """Yield requests until they hold num_images or more; what takes longer than ten seconds says how far it is."""
    done, start_s = 0, time.monotonic()
    next_line_s = start_s + _LINE_EVERY_S
    for request in requests:
        yield request
        done = min(num_images, done + sum(sample is not None for sample in request.samples))
        now_s = time.monotonic()
        if now_s >= next_line_s:
            left_s = (num_images - done) * (now_s - start_s) / max(1, done)
            line = f"the teachers' statistics: {done:,} of {num_images:,} images asked for, {left_s:,.0f} s left"
            print(line, file=sys.stderr, flush=True)
            next_line_s = now_s + _LINE_EVERY_S
        if done >= num_images:
            return


def _standardized(
    config: RunConfig, train: Index | None, mesh: Mesh, source: FeatureSource | None, makers: dict[str, Maker]
) -> Targets:
    """Share one rank's source with its replica, with features standardized by what the run's first start was given."""
    teachers, path = config.teachers, Path(config.out) / "teacher_stats.safetensors"
    fingerprints = {name: maker.fingerprint for name, maker in makers.items()}

    def prepare() -> dict[str, torch.dtype]:
        assert source is not None, "the writer is the first rank of its replica"
        if not path.exists():
            if teachers.stats:
                stats = load_stats(
                    Path(teachers.stats), fingerprints, teachers.standardize, "fit them anew: tools.fit_teacher_stats"
                )
            else:
                stats = fit_sample(config, train, source, fingerprints, teachers.stats_images)
            save_stats(path, stats)
        return dict(source.dtypes)

    dtypes = mesh.from_writer(prepare)
    way_out = "pass the teacher the run began with, or choose another --out"
    return Targets(
        source=source,
        dims={name: maker.dim for name, maker in makers.items()},
        dtypes=dtypes,
        stats=load_stats(path, fingerprints, teachers.standardize, way_out),
        mask_ratio=teachers.asked_ratio,
        group=mesh.new_target_group(),
    )
