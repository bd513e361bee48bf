"""Every layout trains the same run: losses, gradients, weights and moments against one process."""

from __future__ import annotations

from functools import cache

import pytest

from tests.dist.cover import legal_cases, pairs, pairwise_cover
from tests.dist.runs import Case, Trace, train
from tests.pool import Pool

STEPS = 3
# The layouts one by one, and what has too few values to enter the cover.
SINGLE = [
    Case(world=2, tp=2),
    Case(world=2, pp=2),
    Case(world=2, zero=2, overlap=True),
    Case(world=4, tp=2, pp=2, sequence=True, family="cogvit_l"),
    Case(world=2, tp=2, offload=True),
    Case(world=2, pp=2, offload=True, recompute="full", stage="contrast", family="cogvit_l"),
    Case(world=4, optimizer="muon", depth=5),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_qkv="heads", stage="contrast"),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_qkv="fused"),
    Case(world=4, tp=2, optimizer="muon", depth=5, muon_tp="sharded", family="cogvit_l"),
    Case(world=4, tp=4, optimizer="muon", muon_tp="sharded", stage="contrast"),
    Case(world=4, tp=2, pp=2, sequence=True, summary=True),  # its CLS token
    Case(world=4, pp=2, family="cogvit_l", recompute="selective", summary=True),  # the mean of its patches
    Case(world=2, pp=2, stage="contrast", num_micro=1),
    Case(world=4, stage="contrast", num_micro=8, loss="gather"),
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


def rows(config: pytest.Config) -> list[Case]:
    """The cover, or every legal combination where the command line asks for it."""
    cases = legal_cases() if config.getoption("--matrix") else COVER
    return [*SINGLE, *(case for case in cases if case not in SINGLE)]


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
        if name.endswith("k_norm.bias") or name == "bias":
            # The first one's true gradient is 0 and the other's a difference of large sums: what is left is rounding.
            assert error < 1e-6, name
        else:
            assert error <= 1e-5 * gradient.norm(), f"{name}: {error / gradient.norm():.1e}"
    # The first norm is of equal weights; later ones differ by what the update amplifies.
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-6)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5 if case.optimizer == "sgd" else 1e-4)
    assert actual.state.keys() == expected.state.keys()
    tolerance = 1e-5 if case.optimizer == "sgd" else 1e-4
    for key, tensor in expected.state.items():
        if case.optimizer != "sgd" and key.endswith("k_norm.bias"):
            continue  # AdamW normalizes the rounding
        error = actual.state[key] - tensor
        # AdamW moves an element whose gradient is little more than rounding by much: such a one may be off alone.
        alone = case.optimizer != "sgd" and error.norm() <= tolerance * tensor.norm()
        assert alone or error.abs().max() <= tolerance, f"{key}: {error.abs().max():.1e}"


@pytest.mark.parametrize(("qkv", "per_block"), [("split", 6), ("heads", 15), ("fused", 4)])
def test_every_block_matrix_is_orthogonalized(pool: Pool, qkv: str, per_block: int) -> None:
    """So that Muon cannot become SGD unseen: q, k, v (of 4 heads), the projection and the MLP's two, in 2 x 4 blocks."""
    case = Case(optimizer="muon", stage="contrast", muon_qkv=qkv)
    assert reference(pool, case).newton_schulz_calls == STEPS * per_block * 8


def test_borders_between_partitions_cut_matrices(pool: Pool) -> None:
    """That the rows of depth 5 are about what they say: a cut matrix is orthogonalized by each of its owners."""
    case = Case(world=4, optimizer="muon", depth=5)
    split = pool.run(train, world=4, args=(case, STEPS))[0]
    assert split.newton_schulz_calls > reference(pool, case.alone()).newton_schulz_calls


def test_cover_meets_every_pair_of_choices() -> None:
    wanted = set().union(*map(pairs, legal_cases()))
    assert set().union(*map(pairs, COVER)) == wanted
    assert len(COVER) < 25
