"""What Muon sends when the borders of ZeRO's partitions cut matrices, counted on a process group that goes nowhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from cogvit.config import OptimConfig, ScheduleConfig
from cogvit.training.muon import InnerOptimizer
from cogvit.training.optim import ParamGroup
from cogvit.training.partition import MatrixSpan, Partition
from tests.pool import Pool

# The matrices of cogvit_l's blocks at a sixteenth of its width: 256 times as many bytes are those of the model itself.
WIDTH, HIDDEN, DEPTH, SMALLER = 64, 256, 24, 256
SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN)] * DEPTH


def partitions(dp: int) -> list[Partition]:
    """Of every rank."""
    spans, start = [], 0
    for shape in SHAPES:
        spans.append(MatrixSpan(start, shape))
        start = spans[-1].stop
    size = -(-start // dp)
    return [Partition(rank * size, size, tuple(spans)) for rank in range(dp)]


def sent_by_every_rank(rank: int, world: int, dp: int) -> tuple[list[int], int]:
    """Bytes that each of dp ranks sends in an update, and the matrices that all of them make orthogonal."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=dp, store=FakeStore())
    bytes_sent = 0
    all_to_all = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *sizes: Any, **options: Any) -> Any:
        nonlocal bytes_sent
        bytes_sent += input.numel() * input.element_size()
        # The fake group fills what arrives with what is sent, and fails where that is nothing.
        return all_to_all(output, input, *sizes, **options) if len(input) else None

    dist.all_to_all_single = counting
    per_rank, orthogonalized = [], 0
    for partition in partitions(dp):
        param, before = Parameter(torch.zeros(partition.size)), bytes_sent
        schedule = ScheduleConfig(steps=4, warmup_steps=0, kind="constant")
        optimizer = InnerOptimizer([ParamGroup("vision", "muon", 0.1, 1.0, 0.0, schedule, (param,))], OptimConfig())
        optimizer.bind_partitions({param: partition}, dist.group.WORLD, dist.group.WORLD)
        param.grad = torch.ones_like(param)
        optimizer.step()
        per_rank.append(bytes_sent - before)
        orthogonalized += optimizer.newton_schulz_calls
    return per_rank, orthogonalized


def test_what_a_rank_sends_falls_as_ranks_grow_and_no_matrix_is_done_twice(pool: Pool) -> None:
    found = {dp: pool.run(sent_by_every_rank, 1, (dp,))[0] for dp in (8, 64, 256)}
    assert {orthogonalized for _, orthogonalized in found.values()} == {len(SHAPES)}
    mean_mb = {dp: SMALLER * sum(sent) / dp / 1e6 for dp, (sent, _) in found.items()}
    largest_mb = {dp: SMALLER * max(sent) / 1e6 for dp, (sent, _) in found.items()}
    assert mean_mb[8] == 0.0  # 24 layers fall into 8 parts without a cut
    assert mean_mb[256] < mean_mb[64] / 2 < 20.0  # there and back; an all-reduce of the cut ones was 1040 and 1540
    # An owner sends no more than the pieces of its own matrix and those that it holds of others.
    assert largest_mb[256] <= 4 * 4096 * 2048 / 1e6 + 2 * mean_mb[256]


def test_the_owner_holds_a_part_of_what_it_owns() -> None:
    for dp in (8, 64, 256):
        for partition in partitions(dp)[:1]:
            for span in partition.matrices:
                assert partition.owner(span) in partition.holders(span)
                assert sum(partition.length(span, rank) for rank in range(dp)) == span.stop - span.start
