"""ZeRO with the project's optimizer against one process: same norms, same parameters, same state on any layout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from cogvit.config import OptimConfig, ParallelConfig, RunConfig, ScheduleConfig, ZeroConfig
from cogvit.errors import NonFiniteStep
from cogvit.training.muon import InnerOptimizer
from cogvit.training.optim import Module, param_groups
from tests.pool import Pool

CUT_BY_DP2 = "vision.blocks.1.fc.weight"  # half of the block matrices' elements end inside it
SHAPES: dict[str, tuple[int, ...]] = {
    "vision.embed.weight": (5, 8),
    "vision.blocks.0.fc.weight": (12, 8),
    "vision.blocks.0.fc.bias": (12,),
    CUT_BY_DP2: (20, 6),
    "vision.blocks.2.fc.weight": (6, 10),
    "proj.weight": (7, 8),
    "log_t": (1,),
}
TP_DIM = {"vision.blocks.0.fc.weight": 0, "vision.blocks.0.fc.bias": 0, CUT_BY_DP2: 1}
MATRICES = sum("blocks" in name and len(shape) == 2 for name, shape in SHAPES.items())
STEPS = 4
STAGE_OF = {name: int(not name.startswith("vision")) for name in SHAPES}  # under pp=2


@dataclass(frozen=True)
class Trace:
    """What one rank saw."""

    tp_rank: int
    norms: list[float]
    params: dict[str, Tensor]
    newton_schulz_calls: int


class Toy(nn.Module):
    """Parameters without a forward: the loss of a step is linear in them, so each gradient is a known tensor."""

    def __init__(self, names: list[str], tp_rank: int = 0, tp_size: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.named: dict[str, Parameter] = {}
        for name in names:
            param = Parameter(self.shard(name, random_like(name, "start")))
            if name in TP_DIM:
                param.tensor_model_parallel, param.partition_dim = True, TP_DIM[name]
            self.named[name] = param
            self.register_parameter(name.replace(".", "/"), param)

    def shard(self, name: str, full: Tensor) -> Tensor:
        return full.chunk(self.tp_size, dim=TP_DIM[name])[self.tp_rank].clone() if name in TP_DIM else full

    def loss(self, step: int, dp_rank: int) -> Tensor:
        products = [(p * self.shard(name, gradient(name, step, dp_rank))).sum() for name, p in self.named.items()]
        return torch.stack(products).sum()

    def trainable(self) -> Iterator[tuple[str, Parameter, Module]]:
        for name, param in self.named.items():
            yield (
                name,
                param,
                "vision" if name.startswith("vision") else "temperature" if name == "log_t" else "projection",
            )


def random_like(name: str, *what: object) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((name, what)).encode()))
    return torch.randn(SHAPES[name], generator=generator)


def gradient(name: str, step: int, dp_rank: int) -> Tensor:
    return random_like(name, "gradient", step, dp_rank)


def run_config(optimizer: str, stage: int, clip_norm: float = 3.0) -> RunConfig:
    return RunConfig(
        optim=OptimConfig(name=optimizer, lr=0.02, adamw_lr=0.03, clip_norm=clip_norm, weight_decay=0.1),
        schedule=ScheduleConfig(steps=20, warmup_steps=2),
        zero=ZeroConfig(stage),
    )


def start(config: RunConfig, layout: ParallelConfig | None = None):
    """Return the mesh, this rank's toy and its engine."""
    from cogvit.parallel.mesh import start_mesh
    from cogvit.training.zero import initialize

    mesh = start_mesh(layout or ParallelConfig())
    names = [name for name in SHAPES if mesh.pp_size == 1 or STAGE_OF[name] == mesh.pp_rank]
    toy = Toy(names, mesh.tp_rank, mesh.tp_size)
    groups = param_groups(toy.trainable(), config.optim, config.schedule)
    return mesh, toy, initialize(toy, groups, {}, config, mesh.mpu, mesh.dp_size)


def take_step(engine, toy: Toy, step: int, dp_rank: int) -> float:
    """Train in two microbatches and return the norm."""
    engine.set_lr(step)
    with engine.one_reduction():
        for share in (0.25, 0.75):
            (share * toy.loss(step, dp_rank)).backward()
    engine.step()
    return engine.grad_norm()


def params_of(toy: Toy) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in toy.named.items()}


def train_on_rank(rank: int, world: int, layout: ParallelConfig, config: RunConfig) -> Trace:
    mesh, toy, engine = start(config, layout)
    norms = [take_step(engine, toy, step, mesh.dp_rank) for step in range(STEPS)]
    for placeholder in engine._engine.module.placeholders:
        assert placeholder.item() == 0.0
    return Trace(mesh.tp_rank, norms, params_of(toy), engine.inner.newton_schulz_calls)


def train_alone(config: RunConfig, dp_size: int) -> Trace:
    """The reference: one process, whole parameters, mean gradients, torch's clipping."""
    toy = Toy(list(SHAPES))
    optimizer = InnerOptimizer(param_groups(toy.trainable(), config.optim, config.schedule), config.optim)
    norms = []
    for step in range(STEPS):
        for name, param in toy.named.items():
            param.grad = torch.stack([gradient(name, step, r) for r in range(dp_size)]).mean(0)
        clip_norm = config.optim.clip_norm or math.inf
        norms.append(nn.utils.clip_grad_norm_(toy.parameters(), clip_norm).item())
        optimizer.set_lr_step(step)
        optimizer.step()
    return Trace(0, norms, params_of(toy), optimizer.newton_schulz_calls)


def whole(traces: list[Trace], name: str, tp_size: int) -> Tensor:
    """Put a parameter together; every dp rank must hold the same."""
    shards = {}
    for trace in traces:
        if name in trace.params:
            assert torch.equal(shards.setdefault(trace.tp_rank, trace.params[name]), trace.params[name])
    return torch.cat([shards[r] for r in range(tp_size)], TP_DIM[name]) if name in TP_DIM else shards[0]


def assert_same_run(traces: list[Trace], reference: Trace, tp_size: int = 1) -> None:
    for trace in traces:
        assert trace.norms == pytest.approx(reference.norms, rel=1e-6)
    for name, expected in reference.params.items():
        torch.testing.assert_close(whole(traces, name, tp_size), expected, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_dp2_equals_one_process(pool: Pool, optimizer: str, stage: int) -> None:
    config = run_config(optimizer, stage)
    traces, reference = pool.run(train_on_rank, args=(ParallelConfig(), config)), train_alone(config, dp_size=2)
    assert min(reference.norms) > config.optim.clip_norm, "clipping must act in every step"
    assert_same_run(traces, reference)
    if optimizer == "muon":
        assert reference.newton_schulz_calls == STEPS * MATRICES
        calls = [trace.newton_schulz_calls for trace in traces]
        assert sum(calls) == STEPS * MATRICES and all(calls), "one rank does the matrix that is cut"


def test_no_clipping(pool: Pool) -> None:
    config = run_config("sgd", 1, clip_norm=0.0)
    assert_same_run(pool.run(train_on_rank, args=(ParallelConfig(), config)), train_alone(config, dp_size=2))


@pytest.mark.parametrize(("world", "stage"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.long)])
def test_tensor_shards_equal_one_process(pool: Pool, world: int, stage: int) -> None:
    config = run_config("muon", stage)
    traces = pool.run(train_on_rank, world, args=(ParallelConfig(tp=2), config))
    assert_same_run(traces, train_alone(config, dp_size=world // 2), tp_size=2)


def test_pipeline_stages_with_empty_groups_equal_one_process(pool: Pool) -> None:
    config = run_config("muon", 2)
    traces = pool.run(train_on_rank, args=(ParallelConfig(pp=2), config))
    assert all(0 < len(trace.params) < len(SHAPES) for trace in traces)
    assert_same_run(traces, train_alone(config, dp_size=1))


def reload_on_rank(rank: int, world: int, before: RunConfig, after: RunConfig) -> None:
    mesh, toy, engine = start(before)
    for step in range(2):
        take_step(engine, toy, step, mesh.dp_rank)
    saved = [(name, kind, tensor.clone()) for name, kind, tensor in engine.full_tensors(toy.named)]
    assert {name for name, kind, _ in saved if kind == "master"} == set(SHAPES)
    assert [(name, kind) for name, kind, _ in saved] == [
        (n, k) for n, p in toy.named.items() for k in engine.kinds_of(p)
    ]
    for name, kind, tensor in saved:
        assert tensor.any() and tensor.shape == toy.named[name].shape
        assert kind != "master" or torch.equal(tensor, toy.named[name])

    from cogvit.training.zero import initialize

    fresh = Toy(list(SHAPES))
    with torch.no_grad():
        for param in fresh.parameters():
            param.fill_(7.0)
    groups = param_groups(fresh.trainable(), after.optim, after.schedule)
    resumed = initialize(fresh, groups, {}, after, mesh.mpu, mesh.dp_size)
    whole = {(name, kind): tensor.flatten() for name, kind, tensor in saved}
    for fragment in resumed.fragments(fresh.named):
        stretch = slice(fragment.start, fragment.start + fragment.values.numel())
        fragment.values.copy_(whole[fragment.name, fragment.kind][stretch])
    resumed.share_parameters()
    resumed.load_update_count(2)
    assert all(torch.equal(param, fresh.named[name]) for name, param in toy.named.items())
    for old, new in zip(saved, resumed.full_tensors(fresh.named), strict=True):
        assert old[:2] == new[:2] and torch.equal(old[2], new[2])

    assert take_step(engine, toy, 2, mesh.dp_rank) == take_step(resumed, fresh, 2, mesh.dp_rank)
    for name, param in toy.named.items():
        assert torch.equal(param, fresh.named[name]), name


@pytest.mark.parametrize(
    ("world", "optimizer", "stages"), [(2, "muon", (1, 2)), (2, "sgd", (2, 1)), (1, "muon", (1, 1))]
)
def test_state_round_trip_is_bit_exact(pool: Pool, world: int, optimizer: str, stages: tuple[int, int]) -> None:
    pool.run(reload_on_rank, world, args=(run_config(optimizer, stages[0]), run_config(optimizer, stages[1])))


def poison_on_rank(rank: int, world: int, layout: ParallelConfig, name: str, value: float) -> None:
    mesh, toy, engine = start(run_config("muon", 2), layout)
    take_step(engine, toy, 0, mesh.dp_rank)
    assert not engine.has_non_finite_gradient()
    before = [tensor.clone() for _, _, tensor in engine.full_tensors(toy.named)]
    with engine.one_reduction():
        toy.loss(1, mesh.dp_rank).backward()
        if rank == 1:
            toy.named[name].grad.view(-1)[-1] = value
    assert engine.has_non_finite_gradient()
    with pytest.raises(NonFiniteStep, match="nothing was updated"):
        engine.step()
    for old, (name_now, kind, tensor) in zip(before, engine.full_tensors(toy.named), strict=True):
        assert torch.equal(old, tensor), (name_now, kind)
    assert math.isfinite(take_step(engine, toy, 1, mesh.dp_rank))


@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        (ParallelConfig(), CUT_BY_DP2, math.nan),
        (ParallelConfig(), "log_t", math.inf),
        (ParallelConfig(tp=2), CUT_BY_DP2, math.inf),
        (ParallelConfig(tp=2), "proj.weight", math.nan),  # replicated: not in the norm of tp rank 1
        (ParallelConfig(pp=2), "proj.weight", math.nan),
    ],
)
def test_every_rank_sees_a_non_finite_gradient_before_the_update(
    pool: Pool, layout: ParallelConfig, name: str, value: float
) -> None:
    pool.run(poison_on_rank, args=(layout, name, value))


def leave_out_on_rank(rank: int, world: int, stage: int) -> dict[str, float]:
    config = run_config("sgd", stage, clip_norm=0.0)
    _, toy, engine = start(replace(config, optim=replace(config.optim, weight_decay=0.0, momentum=0.0)))
    before = params_of(toy)
    engine.set_lr(1)
    with engine.one_reduction():
        if rank == 0:
            toy.named["proj.weight"].sum().backward()
    engine.step()
    moved = {name: before[name] - after for name, after in params_of(toy).items()}
    torch.testing.assert_close(moved["proj.weight"], torch.full((7, 8), 0.02 / 2))
    assert not any(change.any() for name, change in moved.items() if name != "proj.weight")
    return engine.grad_norms_by_module()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_without_gradient_counts_as_zero(pool: Pool, stage: int) -> None:
    expected = {
        "vision": 0.0,
        "text": 0.0,
        "projection": pytest.approx(math.sqrt(7 * 8) / 2),
        "temperature": 0.0,
        "bias": 0.0,
    }
    assert pool.run(leave_out_on_rank, args=(stage,)) == [expected, expected]


def fail_on_rank(rank: int, world: int, stage: int) -> Trace:
    mesh, toy, engine = start(run_config("muon", stage))
    if rank == 1:
        with suppress(KeyError), engine.one_reduction():
            toy.loss(9, mesh.dp_rank).backward()
            raise KeyError("a body that fails")
    norms = [take_step(engine, toy, step, mesh.dp_rank) for step in range(STEPS)]
    return Trace(mesh.tp_rank, norms, params_of(toy), engine.inner.newton_schulz_calls)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_body_that_raises_waits_for_no_other_rank(pool: Pool, stage: int) -> None:
    assert_same_run(pool.run(fail_on_rank, args=(stage,)), train_alone(run_config("muon", stage), dp_size=2))
