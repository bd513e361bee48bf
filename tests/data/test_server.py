"""The batch server: the same bits as loading in this process, whatever happens to its actor. All share one cluster."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from cogvit.batch import StepBatch
from cogvit.config import RunConfig
from cogvit.errors import DataError
from cogvit.teacher.actors import Cluster, connect, plan_cluster
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.loader import step_batches, steps_ahead
from data_pipeline.server import BatchActor, BatchRequest, BatchServer, batch_bytes, served_batches
from data_pipeline.topology import Seat, topology_of
from tests.data.corpus import ANY_SIZE, members, picture, run_config, write_corpus, write_tar
from tests.pool import Pool

pytestmark = pytest.mark.timeout(180)
STEPS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect(plan_cluster(""), num_cpus=0) as cluster:
        yield cluster


@pytest.fixture
def server(cluster: Cluster) -> BatchServer:
    """A rank's view of the actor, which lives on from test to test while a view of it does."""
    return BatchServer(num_threads=2, max_wait_s=120.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sound images and one that does not decode."""
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    write_tar(directory / "cut.tar", members("0", picture(12, 12, 1)[:60], captions={"en": ["cut short"]}))
    for _ in build_index(str(directory), rules=ANY_SIZE):
        continue
    return directory


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    return load_index(str(shards))


@pytest.fixture(scope="module")
def config(shards: Path) -> RunConfig:
    return run_config(shards=str(shards), tokens_per_pack=4096, images_per_pack=8, prefetch_steps=3)


def seat_of(config: RunConfig, rank: int, num_ranks: int) -> Seat:
    return topology_of(["node"] * num_ranks, config.data.canonical_shares).seat(rank)


def here(index: Index, config: RunConfig, seat: Seat) -> list[StepBatch]:
    with closing(step_batches(index, config, seat, None, reads="captions")) as batches:
        return list(islice(batches, STEPS))


def served(
    server: BatchServer, index: Index, config: RunConfig, seat: Seat, before: Callable[[int], None] = lambda step: None
) -> list[StepBatch]:
    """Take the steps; `before` is called with the number of each before it is taken."""
    taken = []
    with closing(served_batches(server, index, config, seat, None, reads="captions")) as batches:
        for step in range(STEPS):
            before(step)
            taken.append(next(batches))
    return taken


def assert_equal_bits(steps: list[StepBatch], expected: list[StepBatch]) -> None:
    assert len(steps) == len(expected) == STEPS
    for step, wanted in zip(steps, expected, strict=True):
        assert replace(step, micro=()) == replace(wanted, micro=())
        for batch, other in zip(step.micro, wanted.micro, strict=True):
            assert batch.samples == other.samples and batch.targets is other.targets is None
            for packed, same in ((batch.images, other.images), (batch.text, other.text)):
                for field in fields(packed):
                    value, reference = getattr(packed, field.name), getattr(same, field.name)
                    if isinstance(reference, torch.Tensor):
                        assert value.dtype == reference.dtype and torch.equal(value, reference), field.name
                    else:  # what the host knows of the pack
                        assert value == reference, field.name


def process_of(server: BatchServer) -> int:
    """The process that the actor runs in."""
    import ray

    return ray.get(server._actor.__ray_call__.remote(lambda actor: os.getpid()))


def test_batches_are_those_of_this_process_to_the_bit(
    server: BatchServer, index: Index, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in range(2):
        seat = seat_of(config, rank, 2)
        with caplog.at_level(logging.WARNING, logger="data_pipeline.loader"):
            steps = served(server, index, config, seat)
        assert_equal_bits(steps, here(index, config, seat))
    assert "cut.tar:0 counts with weight 0: does not decode" in caplog.text  # what the actor met is said here


def test_a_batch_is_taken_without_a_copy(server: BatchServer, index: Index, config: RunConfig) -> None:
    pending = server.submit(BatchRequest(config, "captions", seat_of(config, 0, 1), 0))
    once, again = (server.result(pending).micro[0].images.patches for _ in range(2))
    assert once.nbytes > 100_000  # smaller ones travel in the reply
    assert once.data_ptr() == again.data_ptr()


def test_a_killed_actor_loses_nothing(server: BatchServer, index: Index, config: RunConfig) -> None:
    seat = seat_of(config, 0, 2)
    killed = []

    def kill(step: int) -> None:
        if step in (2, 5):
            killed.append(process_of(server))
            os.kill(killed[-1], signal.SIGKILL)

    assert_equal_bits(served(server, index, config, seat, kill), here(index, config, seat))
    assert len({*killed, process_of(server)}) == 3


def take_elsewhere(rank: int, world: int, cluster: Cluster, config: RunConfig) -> tuple[list[StepBatch], int]:
    with connect(cluster, num_cpus=0):
        server = BatchServer(num_threads=2, max_wait_s=120.0)
        index = load_index(config.data.shards)
        steps = served(server, index, config, seat_of(config, 1, 2))
        own = [replace(step, micro=tuple(map(in_own_memory, step.micro))) for step in steps]
        return own, process_of(server)


def in_own_memory(batch):  # type: ignore[no-untyped-def]
    """A copy that can be sent on."""
    images, text = (
        replace(packed, **{f.name: getattr(packed, f.name).clone() for f in fields(packed) if f.name != "host"})
        for packed in (batch.images, batch.text)
    )
    return replace(batch, images=images, text=text)


def test_ranks_of_a_node_share_the_actor(
    cluster: Cluster, server: BatchServer, index: Index, config: RunConfig, pool: Pool
) -> None:
    seat = seat_of(config, 0, 2)
    assert_equal_bits(served(server, index, config, seat), here(index, config, seat))
    ((steps, process),) = pool.run(take_elsewhere, 1, (cluster, config), timeout_s=120.0)
    assert_equal_bits(steps, here(index, config, seat_of(config, 1, 2)))
    assert process == process_of(server)


class Mortal:
    """Dies of every request."""

    def __init__(self, directory: str) -> None:
        pass

    def batch(self, request: BatchRequest) -> None:
        os._exit(1)


def view_of(kind: type, generation: int, max_wait_s: float = 120.0) -> BatchServer:
    """A view of an actor of some kind, at generations of its own."""
    import ray

    server = BatchServer(num_threads=1, max_wait_s=max_wait_s)
    server._actor_class = ray.remote(kind)
    server._generation = generation - 1
    server._start_next()
    return server


@pytest.mark.long
def test_what_kills_every_actor_is_reported(cluster: Cluster, config: RunConfig) -> None:
    doomed = view_of(Mortal, generation=100)
    with pytest.raises(DataError, match=r"died or was silent.* 4 times, at step 3;.*--data\.loading in_process"):
        doomed.result(doomed.submit(BatchRequest(config, "captions", seat_of(config, 0, 1), 3)))


def starve(rank: int, world: int, config: RunConfig) -> tuple[str, int]:
    """Ask on a cluster whose memory is always short; returns the end and how many actors there have been."""
    os.environ |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    with connect(plan_cluster(""), num_cpus=0):
        server = BatchServer(num_threads=1, max_wait_s=60.0)
        try:
            server.result(server.submit(BatchRequest(config, "captions", seat_of(config, 0, 1), 3)))
        except DataError as error:
            return str(error), server._generation + 1
    raise AssertionError("an actor lived")


@pytest.mark.long
def test_an_actor_that_the_memory_monitor_kills_is_replaced(config: RunConfig, pool: Pool) -> None:
    ((end, num_actors),) = pool.run(starve, 1, (config,), timeout_s=150.0)
    assert "died or was silent" in end and num_actors == 5


class Deaf:
    """Takes a request and never answers."""

    def __init__(self, directory: str) -> None:
        pass

    def batch(self, request: BatchRequest) -> None:
        time.sleep(1e6)


def test_an_actor_that_hangs_before_its_first_batch_is_replaced(cluster: Cluster, config: RunConfig) -> None:
    import ray
    from ray.exceptions import ActorDiedError

    request = BatchRequest(config, "captions", seat_of(config, 0, 1), 3)
    successor = view_of(BatchActor, generation=201)
    expected = successor.result(successor.submit(request))  # it has started and read its index
    hanging = view_of(Deaf, generation=200, max_wait_s=5.0)
    hung = hanging._actor
    found = hanging.result(hanging.submit(request))
    assert found.position == expected.position and found.micro[0].samples == expected.micro[0].samples
    assert torch.equal(found.micro[0].images.patches, expected.micro[0].images.patches)
    with pytest.raises(ActorDiedError):
        ray.get(hung.batch.remote(request), timeout=60.0)


def test_room_for_batches(index: Index, config: RunConfig) -> None:
    """Enough for all that two ranks have asked for and train on, and never more than the machine has."""
    room = batch_bytes(config, num_ranks=2)
    steps = [
        step
        for rank in range(2)
        for step in here(index, config, seat_of(config, rank, 2))[: steps_ahead(config.data) + 1]
    ]
    held = sum(micro.images.patches.nbytes for step in steps for micro in step.micro)
    assert held <= room < 2 * held
    free = shutil.disk_usage("/dev/shm").free
    endless = replace(config, data=replace(config.data, global_batch_images=10**9))
    assert batch_bytes(endless, num_ranks=2) <= free


def test_shards_that_changed_or_vanished(server: BatchServer, index: Index, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    config = run_config(shards=str(copy))
    (copy / "cut.tar").unlink()  # the index of this rank has it still
    with pytest.raises(DataError, match=r"cut\.tar: No such file"):
        served(server, index, config, seat_of(config, 0, 1))
    list(build_index(str(copy), rules=ANY_SIZE))
    with pytest.raises(DataError, match="changed since this run began"):
        served(server, index, config, seat_of(config, 0, 1))
    for file in copy.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"holds no \.tar shards"):  # of another seed, so the actor reads them anew
        served(server, index, replace(config, seed=8), seat_of(config, 0, 1))
