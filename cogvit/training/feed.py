"""What a run is fed with: its corpus, each rank's part of the global batches, and the teachers' features.

The training loop sees an iterator of batches, and neither Ray nor a file behind it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cogvit.batch import DataPosition
from cogvit.config import RunConfig
from cogvit.config.recipe import prompts_hash
from cogvit.config.split import held_out_part, is_split, train_part
from cogvit.errors import CogViTError, ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from cogvit.batch import Reads, StepBatch
    from cogvit.parallel.mesh import Mesh
    from cogvit.teacher.targets import Targets
    from data_pipeline.index import Index
    from data_pipeline.server import BatchServer
    from data_pipeline.topology import Seat


@dataclass(frozen=True)
class Corpus:
    """The indexes of a run's shards, and what is read of them."""

    train: Index | None  # None where the shards are read in sequential order, or nothing is read
    held_out: Index | None  # None where the run does not evaluate
    reads: Reads  # of each sample


def open_corpus(config: RunConfig, reads: Reads) -> Corpus:
    """Load the indexes, before any process group or model. Errors: DataError, ConfigError."""
    from data_pipeline.index import open_index

    data = config.data
    if reads == "answers":
        return Corpus(None, None, reads)
    if not data.shards:
        raise ConfigError("--data.shards PATTERN is needed: the training shards")
    if config.eval.every_steps and held_out_part(data) is None:
        raise ConfigError(
            "--eval.every-steps needs held-out samples: --data.eval-shards PATTERN, or --data.held-out 0.01"
        )
    held_out = None
    if config.eval.every_steps and (part := held_out_part(data)):
        try:
            held_out = open_index(part, part.shards)
        except DataError as error:
            flag = "--data.held-out" if is_split(data) else "--data.eval-shards"
            raise DataError(f"{flag}, which --eval.every-steps 0 does without: {error}") from None
    return Corpus(open_index(train_part(data), data.shards) if data.order == "planned" else None, held_out, reads)


def first_position(config: RunConfig, corpus: Corpus) -> DataPosition:
    """Return where a new run begins. Errors: DataError."""
    from data_pipeline.loader import start_position
    from data_pipeline.stream import stream_position

    if corpus.reads == "answers":
        return DataPosition(prompts_hash(config), 0)
    if corpus.train is None:
        return stream_position(config)
    return start_position(corpus.train, config, reads=corpus.reads)


def describe(config: RunConfig, corpus: Corpus) -> str:
    """Return one line on what the run trains on, and what of it is left out for which reason."""
    from data_pipeline.loader import usable_index

    if corpus.reads == "answers":
        return f"data: the policy's own answers, {config.rl.group} to each prompt of {config.rl.tasks}"
    if corpus.train is None:
        return f"data: a stream of {config.data.shards}"
    return f"data: {usable_index(corpus.train, corpus.reads).describe()}"


def take_seat(config: RunConfig, mesh: Mesh) -> Seat:
    """Return this rank's part of the global batches, by where all ranks sit: its replica's packs, and what it decodes.

    The first pipeline stage alone embeds patches, and its tensor ranks decode an equal slice of them each. A stream
    knows no places: its replicas are one group.

    Errors: ConfigError, on all ranks, when one does not find its place.
    """
    from data_pipeline.topology import Seat, Slice, local_address, topology_of

    decodes = Slice(mesh.tp_rank, mesh.tp_size) if mesh.is_first_stage else None
    if config.data.order == "sequential":
        return Seat(mesh.dp_rank, mesh.dp_size, range(config.data.canonical_shares), decodes)
    address, failure = "", None
    try:
        address = local_address(config.data.topology)
    except ConfigError as error:
        failure = error
    mesh.raise_together(failure)
    # Where a replica spans nodes, its first rank reads the images.
    leaders = sorted(mesh.gather((mesh.pp_rank, mesh.tp_rank, mesh.dp_rank, address)))[: mesh.dp_size]
    seat = topology_of([place for *_, place in leaders], config.data.canonical_shares).seat(mesh.dp_rank)
    return replace(seat, decodes=decodes)


@contextmanager
def ray_cluster(config: RunConfig, mesh: Mesh, *, asks_actors: bool) -> Iterator[None]:
    """Start or join the run's Ray cluster where this rank talks to teachers or takes batches from a server.

    asks_actors: whether targets come from actors.
    Errors: ConfigError or TeacherUnavailable, on all ranks, when one cannot start or reach it.
    """
    teachers, served = config.teachers, config.data.loading == "server"
    with ExitStack() as stack:
        if asks_actors or served:
            from cogvit.teacher.actors import connect, plan_cluster  # with transformers, which takes seconds
            from cogvit.teacher.room import cpus_of
            from data_pipeline.server import batch_bytes

            num_cpus = cpus_of(teachers) + config.rl.cpus if asks_actors else 0
            store_bytes = batch_bytes(config, mesh.world_size) if served else 0
            # The first rank starts the cluster; the others join it once it is there.
            planned = plan_cluster(teachers.ray_address)
            gpus = None if teachers.share_gpus else _gpus_left(mesh)
            cluster = mesh.from_writer(lambda: stack.enter_context(connect(planned, num_cpus, store_bytes, gpus)))
            failure = None
            if not mesh.is_writer and (served or leads_replica(mesh)):
                try:
                    stack.enter_context(connect(cluster, num_cpus))
                except CogViTError as error:
                    failure = error
            mesh.raise_together(failure)
        yield


def _gpus_left(mesh: Mesh) -> list[str] | None:
    """Name the GPUs of this machine that no rank has, for a cluster that is started here; None without any."""
    import torch

    from cogvit.teacher.room import free_gpus

    ranks = mesh.gather((socket.gethostname(), mesh.device.index))
    if mesh.device.type != "cuda":
        return None
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return free_gpus(visible, {index for host, index in ranks if host == socket.gethostname()})


@dataclass(frozen=True)
class Intake:
    """How a rank comes by its batches."""

    seat: Seat
    server: BatchServer | None  # of its node; None: it loads for itself
    device: torch.device  # that trains on them
    reads: Reads


def leads_replica(mesh: Mesh) -> bool:
    """Whether this rank asks the teachers for its model replica."""
    return mesh.tp_rank == 0 and mesh.pp_rank == 0


def batch_server(config: RunConfig, mesh: Mesh) -> BatchServer | None:
    """Return the server of this rank's node, or None where ranks load for themselves."""
    from data_pipeline.server import BatchServer, node_id

    if config.data.loading == "in_process":
        return None
    ranks_here = mesh.gather(node_id()).count(node_id())
    return BatchServer(config.data.decode_threads * ranks_here, config.data.max_wait_s)


def rank_batches(
    config: RunConfig,
    index: Index | None,
    intake: Intake,
    targets: Targets | None,
    position: DataPosition | None,
) -> Generator[StepBatch]:
    """Return this rank's batches, with the features that it asks for its replica; `Targets.delivered` comes last."""
    from data_pipeline.augment import AS_IT_IS, augmentation_of
    from data_pipeline.pinned import pinned_ahead

    config = replace(config, data=train_part(config.data))  # a batch server opens the index by it
    batches = image_batches(config, index, intake, position)
    if targets is not None:
        augmented = augmentation_of(config.data) != AS_IT_IS
        batches = targets.attached(batches, in_flight_steps=config.teachers.in_flight_steps, augmented=augmented)
    # A thread waits for features and pins them with the images; no message of the ranks is sent from it.
    return pinned_ahead(batches, intake.device) if intake.device.type == "cuda" else batches


def image_batches(
    config: RunConfig, index: Index | None, intake: Intake, position: DataPosition | None
) -> Generator[StepBatch]:
    """Return this rank's batches without targets; no index is a stream."""
    from data_pipeline.loader import step_batches
    from data_pipeline.server import served_batches
    from data_pipeline.stream import stream_batches

    if index is None:
        return stream_batches(config, intake.seat, position, reads=intake.reads)
    load = step_batches if intake.server is None else partial(served_batches, intake.server)
    return load(index, config, intake.seat, position, reads=intake.reads)


def held_out(config: RunConfig, corpus: Corpus, intake: Intake, targets: Targets | None) -> Generator[StepBatch]:
    """Return the global batches of the held-out shards, the same each time."""
    data = held_out_part(config.data)
    assert corpus.held_out is not None and data is not None
    data = replace(data, mixture=(), batch_schedule=(), budget_schedule=())
    data = replace(data, flip=False, crop=1.0, color=0.0)
    return rank_batches(replace(config, data=data), corpus.held_out, intake, targets, None)
