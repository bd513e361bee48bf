"""The worker pool itself: results, failures, hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogvit.errors import ConfigError
from tests.pool import Pool, PoolTimeout


def sum_of_ranks(rank: int, world: int, offset: float) -> torch.Tensor:
    values = torch.full((3,), rank + offset)
    dist.all_reduce(values)
    return values


def fail_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ConfigError("tp=3 is refused")
    dist.barrier()


def wait_for_ever(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(1000)
    dist.barrier()


def die_on_first(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(9)
    dist.barrier()


class Stubborn(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklably(rank: int, world: int) -> None:
    raise Stubborn(1, 2)


def start_megatron(rank: int, world: int) -> tuple[int, int]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    return parallel_state.get_tensor_model_parallel_rank(), os.getpid()


def leave_a_child(rank: int, world: int) -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def imported(rank: int, world: int) -> bool:
    return {"torch", "megatron.core", "deepspeed"} <= sys.modules.keys()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_reduce_over_gloo(pool: Pool, world: int) -> None:
    results = pool.run(sum_of_ranks, world, (0.5,))
    expected = torch.full((3,), sum(rank + 0.5 for rank in range(world)))
    assert len(results) == world
    assert all(torch.equal(result, expected) for result in results)


def test_failure_keeps_its_type_and_traceback(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="tp=3 is refused") as failure:
        pool.run(fail_on_last, 2)
    (note,) = failure.value.__notes__
    assert "on rank 1 of 2" in note
    assert "in fail_on_last" in note


def test_failure_that_does_not_pickle_is_told(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="Stubborn: 1 and 2"):
        pool.run(fail_unpicklably, 1)


def test_hang_is_ended_and_shows_stacks(pool: Pool) -> None:
    start_s = time.monotonic()
    with pytest.raises(PoolTimeout, match="in wait_for_ever"):
        pool.run(wait_for_ever, 2, timeout_s=2.0)
    assert time.monotonic() - start_s < 10
    assert torch.equal(pool.run(sum_of_ranks, 2, (0.0,))[0], torch.ones(3))


def test_death_of_a_rank_is_told(pool: Pool) -> None:
    with pytest.raises(ChildProcessError, match="rank 0 died with status 9"):
        pool.run(die_on_first, 2)


def test_calls_share_imports_and_no_state(pool: Pool) -> None:
    assert pool.run(imported, 2) == [True, True]
    first, second = pool.run(start_megatron, 2), pool.run(start_megatron, 2)  # megatron refuses to be started twice
    assert [tp_rank for tp_rank, _ in first + second] == [0, 1, 0, 1]
    assert len({pid for _, pid in first + second}) == 4


def test_nothing_outlives_a_call(pool: Pool) -> None:
    (child,) = pool.run(leave_a_child, 1)
    status = Path(f"/proc/{child}/status")
    deadline_s = time.monotonic() + 10  # on a loaded machine a killed process may take its time
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
