"""What a run is fed with: its corpus, each rank's part of the global batches, and the teachers' features.

The training loop sees an iterator of batches, and neither Ray nor a file behind it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cogvit.config import RunConfig
from cogvit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from cogvit.batch import DataPosition, StepBatch
    from cogvit.parallel.mesh import Mesh
    from cogvit.teacher.store import StoreFeatures
    from cogvit.teacher.stream import FeatureSource
    from data_pipeline.index import Index
    from data_pipeline.server import BatchServer
    from data_pipeline.topology import Seat

STATS_REQUESTS = 16  # packs on which the teachers' mean and deviation are fitted


@dataclass(frozen=True)
class Corpus:
    """The indexes of a run's shards."""

    train: Index
    held_out: Index | None  # None where the run does not evaluate


def open_corpus(config: RunConfig) -> Corpus:
    """Load the indexes, before any process group or heavy library. Errors: DataError, ConfigError."""
    from data_pipeline.index import open_index

    data = config.data
    if not data.shards:
        raise ConfigError("--data.shards PATTERN is needed: the training shards")
    if config.eval.every_steps and not data.eval_shards:
        raise ConfigError("--eval.every-steps needs --data.eval-shards: the held-out shards")
    held_out = open_index(data, data.eval_shards) if config.eval.every_steps else None
    return Corpus(open_index(data, data.shards), held_out)


def take_seat(config: RunConfig, mesh: Mesh) -> Seat:
    """Return this rank's part of the global batches, by where all ranks sit: its replica's packs, and what it decodes.

    The first pipeline stage alone embeds patches, and its tensor ranks decode an equal slice of them each.

    Errors: ConfigError, on all ranks, when one does not find its place.
    """
    from data_pipeline.topology import Slice, local_address, topology_of

    address, failure = "", None
    try:
        address = local_address(config.data.topology)
    except ConfigError as error:
        failure = error
    mesh.raise_together(failure)
    # Where a replica spans nodes, its first rank reads the images.
    leaders = sorted(mesh.gather((mesh.pp_rank, mesh.tp_rank, mesh.dp_rank, address)))[: mesh.dp_size]
    seat = topology_of([place for *_, place in leaders], config.data.canonical_shares).seat(mesh.dp_rank)
    return replace(seat, decodes=Slice(mesh.tp_rank, mesh.tp_size) if mesh.is_first_stage else None)


@contextmanager
def ray_cluster(config: RunConfig, mesh: Mesh) -> Iterator[None]:
    """Start or join the run's Ray cluster where this rank talks to teachers or takes batches from a server."""
    from cogvit.teacher.actors import connect, plan_cluster
    from data_pipeline.server import batch_bytes

    teachers, served = config.teachers, config.data.loading == "server"
    asks = config.objective == "distill" and teachers.source != "store"
    num_actors = len(teachers.members) * teachers.actors_per_teacher if asks else 0
    store_bytes = batch_bytes(config, mesh.world_size) if served else 0
    with ExitStack() as stack:
        if asks or served:
            # The first rank starts the cluster; the others join it once it is there.
            cluster = plan_cluster(teachers.ray_address)
            if mesh.is_writer:
                cluster = stack.enter_context(connect(cluster, num_actors, store_bytes))
            cluster = mesh.from_writer(lambda: cluster)
            if not mesh.is_writer and (served or leads_replica(mesh)):
                stack.enter_context(connect(cluster, num_actors))
        yield


@dataclass(frozen=True)
class Intake:
    """How a rank comes by its batches."""

    seat: Seat
    server: BatchServer | None  # of its node; None: it loads for itself
    device: torch.device  # that trains on them


def leads_replica(mesh: Mesh) -> bool:
    """Whether this rank asks the teachers for its model replica."""
    return mesh.tp_rank == 0 and mesh.pp_rank == 0


def batch_server(config: RunConfig, mesh: Mesh) -> BatchServer | None:
    """Return the server of this rank's node, or None where ranks load for themselves."""
    from data_pipeline.server import BatchServer, node_id

    if config.data.loading == "in_process":
        return None
    ranks_here = mesh.gather(node_id()).count(node_id())
    return BatchServer(config.data.decode_threads * ranks_here)


def rank_batches(
    config: RunConfig,
    index: Index,
    intake: Intake,
    source: FeatureSource | None,
    position: DataPosition | None,
) -> Generator[StepBatch]:
    """Yield this rank's batches with their teacher targets where the objective has teachers."""
    from cogvit.teacher.stream import attach_targets
    from data_pipeline.loader import step_batches
    from data_pipeline.pinned import pinned_ahead
    from data_pipeline.server import served_batches

    load = step_batches if intake.server is None else partial(served_batches, intake.server)
    batches = load(index, config, intake.seat, position, with_text=config.objective == "contrast")
    if intake.device.type == "cuda":
        batches = pinned_ahead(batches, intake.device)
    with closing(batches):
        if source is None:
            yield from batches
        else:
            teachers = config.teachers
            yield from attach_targets(
                batches, source, mask_ratio=teachers.mask_ratio, in_flight_steps=teachers.in_flight_steps
            )


def held_out(config: RunConfig, corpus: Corpus, intake: Intake, source: FeatureSource | None) -> Generator[StepBatch]:
    """Return the global batches of the held-out shards, the same each time."""
    assert corpus.held_out is not None
    data = replace(config.data, shards=config.data.eval_shards, mixture=(), flip=False, crop=1.0, color=0.0)
    return rank_batches(replace(config, data=data), corpus.held_out, intake, source, None)


def feature_source(config: RunConfig, corpus: Corpus, mesh: Mesh) -> FeatureSource:
    """Return where features come from: one rank of each model replica asks the teachers and shares the answers."""
    from cogvit.teacher.actors import TeacherPool
    from cogvit.teacher.stream import FirstThen
    from cogvit.teacher.zoo import fingerprint, inspect_teacher
    from data_pipeline.augment import augmentation_of
    from data_pipeline.cache import cache_of
    from data_pipeline.loader import image_of

    teachers = config.teachers
    specs = mesh.from_writer(lambda: {member.name: inspect_teacher(member.path) for member in teachers.members})
    fingerprints = mesh.from_writer(lambda: {name: fingerprint(spec) for name, spec in specs.items()})
    dims = {name: spec.dim for name, spec in specs.items()}
    store, pool = None, None
    if leads_replica(mesh) and teachers.source != "online":
        store = stored_features(config, corpus, fingerprints, dims)
    if leads_replica(mesh) and teachers.source != "store":
        augmentation, cache = augmentation_of(config.data), cache_of(config.data)
        pool = TeacherPool(teachers, partial(image_of, augmentation=augmentation, cache=cache))
    source = FirstThen(store, pool) if store and pool else store or pool
    return standardized(config, corpus.train, mesh, source, fingerprints, dims)


def stored_features(
    config: RunConfig, corpus: Corpus, fingerprints: dict[str, str], dims: dict[str, int]
) -> StoreFeatures:
    """Open the feature store of tools.precompute_features for the run's shards.

    Errors: ConfigError names what differs.
    """
    from cogvit.teacher.store import Maker, StoreFeatures, contents_of
    from data_pipeline.sizing import sizing_of

    sizing = sizing_of(config)
    contents: dict[str, str] = {}
    for index in [corpus.train] + ([] if corpus.held_out is None else [corpus.held_out]):
        grids = sizing.grids(index.rows["height_px"], index.rows["width_px"])
        contents |= contents_of(index.shards, index.rows, grids)
    makers = {name: Maker(fingerprints[name], config.teachers.precision, dim) for name, dim in dims.items()}
    return StoreFeatures(Path(config.teachers.store), makers, contents)


def standardized(
    config: RunConfig,
    index: Index,
    mesh: Mesh,
    source: FeatureSource | None,
    fingerprints: dict[str, str],
    dims: dict[str, int],
) -> FeatureSource:
    """Share one rank's source with its replica, with features standardized by what the run's first start fitted."""
    from cogvit.teacher.standardize import Standardized, fit_stats, load_stats, save_stats
    from cogvit.teacher.stream import Shared, request_of
    from data_pipeline.loader import step_batches
    from data_pipeline.topology import topology_of

    path = Path(config.out) / "teacher_stats.safetensors"

    def fit() -> None:
        if source is None or path.exists():
            return
        # On one stage, so that the packs, and with them the statistics, do not depend on the layout.
        alone = replace(config, parallel=replace(config.parallel, pp=1))
        seat = replace(topology_of(["alone"], config.data.canonical_shares).seat(0), decodes=None)
        with closing(step_batches(index, alone, seat, None, with_text=False)) as batches:
            packs = (batch for step in batches for batch in step.micro)
            requests = [request_of(batch, 1.0) for batch in islice(packs, STATS_REQUESTS)]
        save_stats(path, fit_stats(source, requests, fingerprints, config.teachers.standardize))

    mesh.from_writer(fit)
    shared = Shared(source, dims, mesh.model_group, leader=0, device=mesh.device)
    return Standardized(shared, load_stats(path, fingerprints, config.teachers.standardize))
