"""The data plane on Ray: the batches of a node's ranks, made by one actor, and tasks over many items.

This is the only module of the package that imports Ray. It is imported inside the functions because it reads its
authentication from the environment when it is first imported; whoever calls has joined a cluster already.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import DataPosition, Reads, StepBatch
from cogvit.config import RunConfig
from cogvit.errors import CogViTError, DataError
from data_pipeline.index import Index, open_index
from data_pipeline.loader import StepLoader, first_position, in_order, step_loader, steps_ahead
from data_pipeline.topology import Seat

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LOSSES = 4  # of one request in a row: whatever kills an actor so often will go on to
_RETRY_PAUSE_S = 0.1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """All that a step of a rank is a function of; config.data.shards is what is read."""

    config: RunConfig
    reads: Reads
    seat: Seat
    step: int


class BatchActor:
    """Plans, decodes and packs the batches of a node's ranks, in a process of its own."""

    def __init__(self, directory: str) -> None:
        import ray

        os.chdir(directory)  # a relative path means what it means to the ranks
        torch.set_num_threads(1)
        # Ray lays arrays into the object store as they are, and maps them where they are taken.
        ray.util.register_serializer(Tensor, serializer=Tensor.numpy, deserializer=mapped)
        self._loaders: list[tuple[RunConfig, Reads, StepLoader]] = []  # of the training shards and the held-out ones
        self._lock = threading.Lock()

    def batch(self, request: BatchRequest) -> StepBatch | CogViTError:
        """Make a batch; an error that the user can act on is the answer."""
        return _attempt(self._make, request)

    def _make(self, request: BatchRequest) -> StepBatch:
        return self._loader(request.config, request.reads).step(request.seat, request.step)

    def _loader(self, config: RunConfig, reads: Reads) -> StepLoader:
        with self._lock:  # the first request reads the index and the others wait for it
            for known_config, known_reads, loader in self._loaders:
                if (known_config, known_reads) == (config, reads):
                    return loader
            loader = step_loader(open_index(config.data, config.data.shards), config, reads=reads)
            self._loaders.append((config, reads, loader))
            return loader


def mapped(array: NDArray[Any]) -> Tensor:
    """Return the tensor in an array's memory, which is the object store's: nobody may write into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def node_id() -> str:
    """Return Ray's name of the node that this process is on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def batch_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return what the batches of ranks on one machine take in its object store, those that are made ahead included.

    At most three quarters of the shared memory that is free; Ray puts on disk what its store cannot hold.
    """
    data = config.data
    rows, columns = config.vision.base_grid
    most_patches = rows * columns if data.sizing == "square" else data.max_patches
    most_patches = max(most_patches, config.language.max_patches if config.language.path else 0)  # of several images
    # Every tensor rank has whole packs, mostly zeros, and may fill its last one with padding.
    tokens = data.global_batch_images * most_patches * config.parallel.tp + data.tokens_per_pack * num_ranks
    wanted = tokens * 3 * config.vision.patch_size**2 * (steps_ahead(data) + 1)
    return min(wanted, shutil.disk_usage("/dev/shm").free * 3 // 4)


@dataclass(frozen=True, slots=True)
class Pending:
    """A request under way."""

    request: BatchRequest
    generation: int  # of the actor
    reply: Any  # ray.ObjectRef


class BatchServer:
    """The batch actor of this node; every rank of the node has such a view of it, and the first to come starts it.

    Batches that are made lie in the node's object store and outlive the actor; one that died, or is silent for
    max_wait_s, has a successor, which makes the missing ones again, the same to the bit, for they are a function of the
    request.
    """

    def __init__(self, num_threads: int, max_wait_s: float) -> None:
        import ray

        self._actor_class = ray.remote(BatchActor)
        self._node = node_id()
        self._num_threads, self._max_wait_s = num_threads, max_wait_s
        self._generation = -1
        self._start_next()

    def submit(self, request: BatchRequest) -> Pending:
        """Ask for a batch."""
        return Pending(request, self._generation, self._actor.batch.remote(request))

    def result(self, pending: Pending) -> StepBatch:
        """Wait for a batch; its tensors are the object store's and must not be written.

        Errors: DataError as StepLoader.step, or when the actor does not start or one request loses it again and again.
        """
        from ray import get
        from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

        for _ in range(_MOST_LOSSES):
            try:
                answer = get(pending.reply, timeout=self._max_wait_s)
            except GetTimeoutError:
                self._replace(pending.generation)
            except RayTaskError:  # a fault of ours in the actor
                raise
            except (ActorDiedError, OutOfMemoryError) as error:  # the latter at every call, once it was killed
                if isinstance(error, ActorDiedError) and error.actor_init_failed:
                    raise DataError(f"the batch server did not start: {str(error).splitlines()[-1]}") from error
                self._replace(pending.generation)
            except RayError as error:
                _LOG.warning("a batch was lost (%s); it is made again", error)
                time.sleep(_RETRY_PAUSE_S)
            else:
                if isinstance(answer, CogViTError):
                    raise answer
                return answer
            pending = self.submit(pending.request)
        raise DataError(
            f"the batch server died or was silent for data.max_wait_s={self._max_wait_s:g}, {_MOST_LOSSES} times, at"
            f" step {pending.request.step}; look at the node's memory and Ray's logs, or load with --data.loading"
            " in_process"
        )

    def _replace(self, lost_generation: int) -> None:
        """End a dead or hung actor and start its successor, unless an earlier request of its has done so."""
        from ray import kill

        if lost_generation == self._generation:
            _LOG.warning("the batch server of this node died or hangs; another one makes the missing batches")
            kill(self._actor)
            self._start_next()

    def _start_next(self) -> None:
        """Start the actor of the next generation, or take the one that another rank has started under its name."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._generation += 1  # Ray keeps a dead actor's name
        named = self._actor_class.options(
            name=f"batches-{self._node}-{self._generation}",
            get_if_exists=True,
            num_cpus=0,  # its place is given; the CPUs that Ray counts are the teachers'
            max_restarts=0,
            max_concurrency=self._num_threads,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
        )
        self._actor = named.remote(os.getcwd())


@dataclass(frozen=True)
class _Served:
    """Makes the steps of a seat in the node's actor."""

    server: BatchServer
    config: RunConfig
    reads: Reads
    seat: Seat
    plan_hash: str

    def submit(self, step: int) -> Pending:
        """Ask for a step."""
        return self.server.submit(BatchRequest(self.config, self.reads, self.seat, step))

    def result(self, handle: Pending) -> StepBatch:
        """Wait for a step. Errors: DataError also when the actor found other shards than this rank did."""
        made = self.server.result(handle)
        if made.position.plan_hash != self.plan_hash:
            raise DataError(f"{self.config.data.shards} changed since this run began; restore them or start a new run")
        return made

    def close(self) -> None:
        """Leave what is under way to end by itself; Ray drops what nobody takes."""


def served_batches(
    server: BatchServer, index: Index, config: RunConfig, seat: Seat, position: DataPosition | None, *, reads: Reads
) -> Generator[StepBatch]:
    """Yield what `loader.step_batches` yields, made by the node's actor; index is that of config.data.shards.

    Errors: as `loader.step_batches`, and as `BatchServer.result`.
    """
    first = first_position(index, config, position, reads=reads)
    return in_order(_Served(server, config, reads, seat, first.plan_hash), config.data, first.step)


def run_tasks(task: Callable[[Item], Result], items: Iterable[Item], *, in_flight: int) -> Iterator[Result]:
    """Run a task on each item in Ray's workers, so many at a time; yields the results as they come.

    Ray runs a task again whose worker died. Errors: the first CogViTError of a task.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(_attempt)
    waiting = iter(items)
    running = [remote.remote(task, item) for item in islice(waiting, in_flight)]
    while running:
        (ready,), running = ray.wait(running, num_returns=1)
        running += [remote.remote(task, item) for item in islice(waiting, 1)]
        answer = ray.get(ready)
        if isinstance(answer, CogViTError):
            raise answer
        yield answer


def _attempt(task: Callable[[Any], Any], item: Any) -> Any:
    """Run a task; an error that the user can act on comes back as itself, not wrapped in Ray's."""
    try:
        return task(item)
    except CogViTError as error:
        return error
