"""Every layout trains the same run: losses, gradient norms, weights and moments against one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.dist.runs import Case, Trace, train
from tests.pool import Pool

STEPS = 3
CASES = [
    Case(world=2, tp=2),
    Case(world=2, pp=2),
    Case(world=2),
    Case(world=4, tp=2, pp=2),
    Case(world=2, tp=2, sequence=True, family="cogvit_l"),
    Case(world=4, tp=2, pp=2, sequence=True, recompute="full", family="cogvit_l"),
    Case(world=2, tp=2, stage="contrast"),
    Case(world=2, pp=2, stage="contrast", family="cogvit_l"),
    Case(world=2, stage="contrast", zero=2),
    Case(world=2, pp=2, stage="contrast", num_micro=1),
    Case(world=4, stage="contrast", num_micro=8, loss="gather"),
    Case(world=4, pp=2, stage="contrast", num_micro=8),
    Case(world=4, tp=2, pp=2, stage="contrast", recompute="full"),
    Case(world=4, tp=2, stage="contrast", sequence=True, zero=2, optimizer="muon", family="cogvit_l"),
    Case(world=4, pp=2, zero=2, optimizer="muon"),
    Case(world=2, tp=2, optimizer="adamw"),
]


def name_of(case: Case) -> str:
    """A readable test id."""
    flags = [f"tp{case.tp}", f"pp{case.pp}", f"dp{case.world // (case.tp * case.pp)}", f"zero{case.zero}"]
    flags += ["sp"] * case.sequence + ["recompute"] * (case.recompute == "full")
    flags += [case.loss, f"micro{case.num_micro}"] * (case.stage == "contrast")
    return "-".join([case.stage, case.family, case.optimizer, *flags])


@cache
def reference(pool: Pool, case: Case) -> Trace:
    """The run on one process."""
    return pool.run(train, world=1, args=(case, STEPS))[0]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_layout_trains_as_one_process(pool: Pool, case: Case) -> None:
    expected = reference(pool, case.alone())
    actual = pool.run(train, world=case.world, args=(case, STEPS), timeout_s=100.0)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5 if case.optimizer == "adamw" else 1e-6)
    # The first norm is of equal weights; later ones differ by what the update amplifies.
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-6)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5 if case.optimizer == "sgd" else 1e-4)
    assert actual.state.keys() == expected.state.keys()
    tolerance = 1e-5 if case.optimizer == "sgd" else 1e-4
    for key, tensor in expected.state.items():
        if case.optimizer != "sgd" and key.endswith("k_norm.bias"):
            continue  # its true gradient is 0; AdamW normalizes the noise
        torch.testing.assert_close(
            actual.state[key], tensor, rtol=0.0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
