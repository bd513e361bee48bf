"""The process mesh: which rank is where on the tp, pp and dp axes, and the groups that talk.

Order of axes: tp fastest, then pp, then dp (`ParallelConfig.place`). When ranks are numbered along the switches,
tensor ranks sit on one node, pipeline neighbors under one switch, and only the gradients of dp cross the spine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from cogvit.config import ParallelConfig
from cogvit.config.device import local_device
from cogvit.config.environment import this_process
from cogvit.errors import CogViTError
from cogvit.parallel.cpu import prepare_process
from cogvit.parallel.descriptors import take_descriptors
from cogvit.parallel.meeting import StoreKeeper, join_world

prepare_process()
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

Result = TypeVar("Result")


class MegatronGroups:
    """What DeepSpeed asks of an `mpu`, answered by Megatron's parallel_state.

    "Model parallel" is the tp x pp group: DeepSpeed reduces the gradient norm over it.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Rank inside the tp x pp group."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Size of the tp x pp group."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of the dp group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


@dataclass(frozen=True)
class Mesh:
    """This rank's place and its groups; made once by `start_mesh`."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    keeper: StoreKeeper | None = None  # of the store of many ranks; the first one started it

    @property
    def is_writer(self) -> bool:
        """The one rank that writes the run's logs and reports."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """This rank embeds."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank computes losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share one layer."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Ranks that share one model replica's depth."""
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard of the model and see other data."""
        return parallel_state.get_data_parallel_group()

    @property
    def model_group(self) -> dist.ProcessGroup:
        """The tp x pp ranks of one replica: they train on the same batch."""
        return parallel_state.get_model_parallel_group()

    @property
    def mpu(self) -> type[MegatronGroups]:
        """The adapter that DeepSpeed takes."""
        return MegatronGroups

    def new_dp_neighbors(self, ranks: int) -> dist.ProcessGroup:
        """Make the group of so many neighbors on the dp axis, which must divide it. Collective over the dp ranks."""
        if ranks == self.dp_size:
            return self.dp_group
        first = self.dp_rank - self.dp_rank % ranks
        neighbors = dist.get_process_group_ranks(self.dp_group)[first : first + ranks]
        group: dist.ProcessGroup = dist.new_group(neighbors, use_local_synchronization=True)
        return group

    def new_target_group(self) -> dist.ProcessGroup | None:
        """Make the group of each replica's first rank, which asks the teachers, and its last stage, which needs them.

        None on other ranks. Collective over all ranks.
        """
        if self.pp_size == 1:
            return self.model_group
        layout = ParallelConfig(tp=self.tp_size, pp=self.pp_size)
        groups: list[list[int]] = [[] for _ in range(self.dp_size)]
        for rank in range(self.world_size):
            tp_rank, pp_rank, dp_rank = layout.place(rank)
            if pp_rank == self.pp_size - 1 or (tp_rank, pp_rank) == (0, 0):
                groups[dp_rank].append(rank)
        return dist.new_subgroups_by_enumeration(groups)[0]

    def all_reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place over every rank and return the tensor."""
        dist.all_reduce(values, op=op)
        return values

    def agree_max(self, value: int) -> int:
        """Return the largest value any rank brings; the same answer everywhere."""
        return self.agree_all(value)[0]

    def agree_all(self, *values: int) -> list[int]:
        """Return the largest of each of some values; one message and one wait for the device for all of them."""
        largest = torch.stack([torch.full((), value, device=self.device) for value in values])
        return self.all_reduce(largest, dist.ReduceOp.MAX).tolist()

    def shorten_timeouts(self, timeout_s: float) -> None:
        """Let collectives wait this long from now on: start-up takes minutes, a step must not."""
        for group in (dist.group.WORLD, self.tp_group, self.pp_group, self.dp_group, self.model_group):
            _set_pg_timeout(timedelta(seconds=timeout_s), group)

    def gather(self, value: Result) -> list[Result]:
        """Return what every rank brings, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_writer(self, make: Callable[[], Result]) -> Result:
        """Run `make` on the writer; its (picklable) result is returned, or its CogViTError raised, on every rank."""
        answer: list[Any] = [None, None]
        if self.is_writer:
            try:
                answer[0] = make()
            except CogViTError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def raise_together(self, error: CogViTError | None) -> None:
        """Raise on every rank when any rank brings an error: its own where it has one, else that of the first that has.

        Costs one small reduction when all is well.
        """
        if not self.agree_max(int(error is not None)):
            return
        errors = self.gather(error)
        raise error or next(other for other in errors if other is not None)


def start_mesh(layout: ParallelConfig, device: torch.device | None = None, *, timeout_s: float = 1800.0) -> Mesh:
    """Join the world (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone if unset) and split it into axes.

    A process group that already exists is used as it is. gloo on CPU, nccl on CUDA.
    device: this process's; by default a GPU where torch sees one.
    """
    process = this_process()
    if device is None:
        device = local_device("auto" if torch.cuda.is_available() else "cpu", process)
    keeper = None
    if not dist.is_initialized():
        take_descriptors(layout, process.rank, process.world_size, gloo=device.type == "cpu")
        keeper = join_world(process, "gloo" if device.type == "cpu" else "nccl", timeout_s)
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, order="tp-cp-ep-pp-dp", create_gloo_process_groups=False
    )
    # Recompute saves and restores Megatron's tracked RNG states, so they must exist; no draw of ours uses them.
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=layout.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=layout.pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        keeper=keeper,
    )


def stop_mesh(mesh: Mesh) -> None:
    """Leave the world; the counterpart of `start_mesh`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    if mesh.keeper is not None:
        mesh.keeper.close()
