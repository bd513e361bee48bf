"""Every layout trains the same run: losses, gradients, weights and moments against one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
from torch import Tensor

from tests.dist.cover import legal_cases, pairs, pairwise_cover
from tests.dist.runs import ADAMW_LR, Case, Trace, train
from tests.pool import Pool

STEPS = 3
GRADIENT_TOLERANCE = 1e-5  # of a tensor's norm
# The layouts one by one, and what has too few values to enter the cover.
SINGLE = [
    Case(world=2, tp=2),
    Case(world=2, pp=2),
    Case(world=2, zero=2, overlap=True),
    Case(world=4, tp=2, overlap=True, stage="contrast", family="cogvit_l", recompute="full"),
    Case(world=4, tp=2, pp=2, sequence=True, family="cogvit_l"),
    Case(world=2, pp=2, offload=True, recompute="full", stage="contrast", family="cogvit_l"),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_qkv="heads", stage="contrast"),
    Case(world=4, pp=2, family="cogvit_l", recompute="selective", summary=True),  # the mean of its patches
    Case(world=4, stage="contrast", num_micro=8, loss="gather"),
]
# What make test-long adds beside the cover.
MORE = [
    Case(world=4, overlap=True, optimizer="muon", stage="contrast", num_micro=4),
    Case(world=2, tp=2, offload=True),
    Case(world=4, optimizer="muon", depth=5),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_qkv="fused"),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_tp="sharded", family="cogvit_l"),
    Case(world=4, tp=4, optimizer="muon", muon_tp="sharded", stage="contrast"),
    Case(world=4, tp=2, pp=2, sequence=True, summary=True),  # its CLS token
    Case(world=2, pp=2, stage="contrast", num_micro=1),
    Case(world=4, pp=2, stage="contrast", num_micro=8),
]
COVER = pairwise_cover(legal_cases())


def name_of(case: Case) -> str:
    """A readable test id."""
    flags = [f"tp{case.tp}", f"pp{case.pp}", f"dp{case.dp}", f"zero{case.zero}"]
    flags += ["sp"] * case.sequence + [case.recompute] * (case.recompute != "none") + ["overlap"] * case.overlap
    if case.optimizer == "muon":
        flags += [case.muon_qkv, case.muon_tp, f"depth{case.depth}"]
    flags += ["summary"] * case.summary
    flags += [case.loss, f"micro{case.num_micro}"] * (case.stage == "contrast")
    return "-".join([case.stage, case.family, case.optimizer, *flags])


def rows(config: pytest.Config) -> list[Any]:
    """The cover, whose runs take minutes, or every legal combination where the command line asks for it."""
    others = dict.fromkeys([*MORE, *(legal_cases() if config.getoption("--matrix") else COVER)])
    return [*SINGLE, *(pytest.param(case, marks=pytest.mark.long) for case in others if case not in SINGLE)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", rows(metafunc.config), ids=name_of)


@cache
def reference(pool: Pool, case: Case) -> Trace:
    """The run on one process."""
    return pool.run(train, world=1, args=(case, STEPS))[0]


def test_layout_trains_as_one_process(pool: Pool, case: Case) -> None:
    expected = reference(pool, case.alone())
    actual = pool.run(train, world=case.world, args=(case, STEPS), timeout_s=100.0)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5 if case.optimizer == "adamw" else 1e-6)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm()
        if is_rounding(name):
            assert error < 1e-6, name
        else:
            assert error <= GRADIENT_TOLERANCE * gradient.norm(), f"{name}: {error / gradient.norm():.1e}"
    # The first norm is of equal weights; later ones differ by what the update amplifies.
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-6)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5 if case.optimizer == "sgd" else 1e-4)
    assert_same_state(actual, expected, case)


def is_rounding(name: str) -> bool:
    """Whether a gradient is no more: the first one's is 0 by nature, the other's a difference of large sums."""
    return name.endswith("k_norm.bias") or name == "bias"


def assert_same_state(actual: Trace, expected: Trace, case: Case) -> None:
    """Compare weights by element and moments by tensor."""
    assert actual.state.keys() == expected.state.keys()
    sgd = case.optimizer == "sgd"
    for key, tensor in expected.state.items():
        kind, name = key.split("/")
        error = (actual.state[key] - tensor).abs()
        if kind == "master":
            tolerance, doubt = (1e-6, 0.0) if sgd else (1e-4, adamw_doubt(expected, name))
            off = int((error > tolerance).sum())
            assert (error <= tolerance + doubt).all(), f"{key}: {error.max():.1e}"
            assert off <= max(1, error.numel() // 1000) or name.endswith("k_norm.bias"), f"{key}: {off} are off"
        elif not is_rounding(name):
            size = float(tensor.norm())
            assert error.norm() <= (3e-5 if sgd else 1e-3) * size, f"{key}: {error.norm() / size:.1e}"


def adamw_doubt(expected: Trace, name: str) -> Tensor | float:
    """Return how far the elements of a weight may lie apart because gradients are rounded; 0 where Muon updates it.

    AdamW divides by the root of the squared gradients. So the error that the comparison of gradients lets pass, all of
    which may lie in one element, counts as a share of that element's own gradient: an element whose gradient is mostly
    rounding may go the other way. One whose gradient is exactly 0 may not. Source: the derivatives of m / sqrt(v) by
    the gradients (betas of 0.9 and 0.95), summed over three steps, stay below 9 over the first step's gradient.
    """
    if f"exp_avg_sq/{name}" not in expected.state:
        return 0.0
    if name.endswith("k_norm.bias"):
        return 2.0 * ADAMW_LR * STEPS
    size = expected.gradients[name].abs()
    share = 3.0 * GRADIENT_TOLERANCE * size.norm() / size
    return ADAMW_LR * STEPS * share.nan_to_num(nan=0.0, posinf=0.0).clamp(max=2.0)


@pytest.mark.parametrize(("optimizer", "moment"), [("sgd", "momentum"), ("adamw", "exp_avg"), ("adamw", "exp_avg_sq")])
def test_comparison_sees_small_errors(pool: Pool, optimizer: Literal["sgd", "adamw"], moment: str) -> None:
    """A moment off by a hundredth, or a single weight that misses a hundredth of its way (SGD) or a twentieth."""
    case = Case(optimizer=optimizer)
    expected = reference(pool, case)
    assert_same_state(expected, expected, case)
    name = "vision.blocks.1.mlp.fc1.weight"
    weight = expected.state[f"master/{name}"].clone()
    weight.view(-1)[expected.gradients[name].abs().argmax()] += 2e-6 if optimizer == "sgd" else 2.5e-4
    for key, wrong in ((f"{moment}/{name}", 1.01 * expected.state[f"{moment}/{name}"]), (f"master/{name}", weight)):
        with pytest.raises(AssertionError, match=key):
            assert_same_state(replace(expected, state={**expected.state, key: wrong}), expected, case)


@pytest.mark.parametrize(("qkv", "per_block"), [("split", 6), ("heads", 15), ("fused", 4)])
def test_every_block_matrix_is_orthogonalized(pool: Pool, qkv: str, per_block: int) -> None:
    """So that Muon cannot become SGD unseen: q, k, v (of 4 heads), projection and the MLP's two, in 2 x 4 blocks."""
    case = Case(optimizer="muon", stage="contrast", muon_qkv=qkv)
    assert reference(pool, case).newton_schulz_calls == STEPS * per_block * 8


@pytest.mark.parametrize("tp", [1, 2])
def test_a_matrix_is_orthogonalized_once_however_it_is_cut(pool: Pool, tp: int) -> None:
    case = Case(world=4, tp=tp, optimizer="muon", depth=5)
    split = pool.run(train, world=4, args=(case, STEPS))[0]
    assert split.newton_schulz_calls == reference(pool, case.alone()).newton_schulz_calls


@pytest.mark.parametrize(("stage", "late"), [("distill", 0), ("contrast", 3)])
def test_gradients_are_sent_while_backward_runs(pool: Pool, stage: str, late: int) -> None:
    """All but stage 2's temperature and bias, which come before the towers, and its mask token, which has none."""
    case = Case(world=2, stage=stage, family="cogvit_l", overlap=True)
    trace = pool.run(train, world=2, args=(case, 1))[0]
    assert trace.sent_early == len(trace.gradients) - late


def test_cover_meets_every_pair_of_choices() -> None:
    wanted = set().union(*map(pairs, legal_cases()))
    assert set().union(*map(pairs, COVER)) == wanted
    assert len(COVER) < 25
