"""How many bytes ranks send in a step, and what sending fewer of them changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.parallel.mesh import start_mesh
from tests.dist.runs import Case, Trace, run_config, start_engine, train
from tests.dist.test_layouts import is_rounding
from tests.pool import Pool

PASSES = 2  # of `train` with one step: its gradients come first


@contextmanager
def counted(sent_bytes: Counter[str]) -> Iterator[None]:
    """Count what is handed to the collectives that reduce, and to a neighbor of the pipeline."""
    names = ("reduce_scatter_tensor", "all_reduce", "batch_isend_irecv")
    originals = {name: getattr(dist, name) for name in names}

    def scatter(received: Tensor, sent: Tensor, **options: Any) -> Any:
        sent_bytes["reduce_scatter"] += sent.nbytes
        return originals["reduce_scatter_tensor"](received, sent, **options)

    def reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("async_op"):  # those of gradients alone are
            sent_bytes["all_reduce"] += tensor.nbytes
        return originals["all_reduce"](tensor, *args, **options)

    def neighbors(operations: list[dist.P2POp]) -> Any:
        sent_bytes["pipeline"] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return originals["batch_isend_irecv"](operations)

    for name, wrapper in zip(names, (scatter, reduce, neighbors), strict=True):
        setattr(dist, name, wrapper)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def train_counting(rank: int, world: int, case: Case) -> tuple[Trace, Counter[str]]:
    sent_bytes: Counter[str] = Counter()
    with counted(sent_bytes):
        trace = train(rank, world, case, 1)
    return trace, sent_bytes


def largest_error(actual: Trace, expected: Trace) -> float:
    """Of any gradient, in its norm."""
    errors = {
        name: float((actual.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.gradients.items()
        if not is_rounding(name)
    }
    return max(errors.values())


def test_gradients_are_scattered_and_beside_backward_cost_twice_the_bytes(pool: Pool) -> None:
    case = Case(world=4, family="cogvit_l")
    after, beside = (pool.run(train_counting, case.world, (one,))[0] for one in (case, replace(case, overlap=True)))
    values = sum(gradient.numel() for gradient in after[0].gradients.values())
    assert set(after[1]) == {"reduce_scatter"} and set(beside[1]) == {"all_reduce"}
    # Behind every group's parameters is padding, below 2 values a rank; empty groups are a placeholder.
    assert 4 * PASSES * values <= after[1]["reduce_scatter"] < 1.01 * 4 * PASSES * values
    assert 4 * PASSES * values <= beside[1]["all_reduce"] < 1.01 * 4 * PASSES * values  # each goes round twice


def small_buckets(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    """Gradients that come in many messages."""
    from cogvit.training.reduction import Reduction
    from tests.dist.runs import micro_of, whole

    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    zero = engine.zero
    zero._reduction = Reduction(zero._flat, zero._zero.dp_process_group, 1000, torch.float32)
    return whole(engine.plain_gradients(objective, micro_of(case, mesh)), mesh)


@pytest.mark.long
def test_buckets_change_no_gradient(pool: Pool) -> None:
    case = Case(world=4, family="cogvit_l")
    expected = pool.run(train_counting, case.world, (case,))[0][0].gradients
    actual = pool.run(small_buckets, case.world, (case,))[0]
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.long), True])
def test_gradients_in_bf16_are_half_the_bytes_and_close(pool: Pool, overlap: bool) -> None:
    case = Case(world=2, family="cogvit_l", overlap=overlap)
    exact, rounded = (
        pool.run(train_counting, case.world, (replace(case, gradient_messages=dtype),))[0] for dtype in ("fp32", "bf16")
    )
    assert 2 * rounded[1].total() == exact[1].total()
    assert rounded[0].losses == exact[0].losses
    error = largest_error(rounded[0], exact[0])
    print(f"largest error of a gradient: {error:.2e}")
    assert 1e-4 < error < 4e-3  # 8 bits: two values and their sum are rounded, each by 2e-3 at most


def test_stages_send_the_residual_stream_in_fp32_or_half_of_it(pool: Pool) -> None:
    """Without a pipeline nothing is rounded; messages in fp32 change nothing but the order of sums, in bf16 a bit."""
    alone = Case(family="cogvit_l", precision="bf16")
    case = replace(alone, world=2, pp=2)
    expected = pool.run(train, 1, (alone, 1))[0]
    exact, rounded = (
        pool.run(train_counting, case.world, (replace(case, pipeline_messages=dtype),))[0] for dtype in ("fp32", "bf16")
    )
    config = run_config(case)
    tokens = 96 * case.num_micro
    assert exact[1]["pipeline"] == PASSES * 4 * tokens * config.vision.embed_dim
    assert 2 * rounded[1]["pipeline"] == exact[1]["pipeline"]
    assert exact[0].losses == pytest.approx(expected.losses, rel=1e-6)
    errors = [largest_error(one[0], expected) for one in (exact, rounded)]
    print(f"largest error of a gradient: {errors[0]:.2e}, messages in bf16: {errors[1]:.2e}")
    print(f"loss: {exact[0].losses[0]:.7f}, messages in bf16: {rounded[0].losses[0]:.7f}")
    assert errors[0] < 1e-5 < errors[1] < 0.03
    assert rounded[0].losses == pytest.approx(expected.losses, rel=1e-3)


def synchronized(rank: int, world: int, case: Case) -> int:
    """How often a step waits for the whole device."""
    waits = []
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: waits.append(device)
    train(rank, world, case, 1)
    torch.cuda.synchronize = synchronize
    return len(waits)


def test_a_message_to_a_neighbor_waits_for_no_device(pool: Pool) -> None:
    """Megatron's own default synchronizes after every one, 16 times here; the end of a step does so on CUDA alone."""
    assert pool.run(synchronized, 2, (Case(world=2, pp=2),)) == [0, 0]
