"""`--deterministic`: on a CPU it changes no bit; what has no deterministic form is one line."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cogvit.errors import ConfigError
from cogvit.model.attention import segments_of
from cogvit.model.position import resized_by_products
from cogvit.model.tokens import order_behind_cls
from cogvit.stages import check_recipe, read_run
from cogvit.training.deterministic import deterministic
from tests.dist.runs import Case, Trace, train
from tests.pool import Pool


def train_deterministic(rank: int, world: int, case: Case, steps: int) -> Trace:
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        return train(rank, world, case, steps)


@pytest.mark.parametrize(
    "case",
    [
        Case(family="reference", optimizer="muon", summary=True),
        Case(world=2, stage="contrast", family="cogvit_l", optimizer="adamw", recompute="full", precision="bf16"),
    ],
    ids=["distill", "contrast"],
)
def test_a_run_has_the_bits_that_it_had(pool: Pool, case: Case) -> None:
    plain, again = (pool.run(run, case.world, (case, 2))[0] for run in (train, train_deterministic))
    assert (again.losses, again.grad_norms) == (plain.losses, plain.grad_norms)
    for one, other in ((plain.gradients, again.gradients), (plain.state, again.state)):
        assert one.keys() == other.keys()
        assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_the_order_behind_cls_tokens_counts_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA torch adds up whole numbers alone in a fixed order."""
    counted, whole = torch.Tensor.cumsum, []

    def cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
        whole.append(counted(x, dim))
        return whole[-1]

    monkeypatch.setattr(torch.Tensor, "cumsum", cumsum)
    order_behind_cls(segments_of(torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32)))
    assert whole and not any(x.is_floating_point() for x in whole)


@pytest.mark.parametrize("grid", [(3, 5), (1, 9), (8, 2)])
def test_a_table_is_resized_by_products_as_by_interpolation(grid: tuple[int, int]) -> None:
    tables = [torch.randn(1, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for _ in "ab"]
    mine, other = (table.requires_grad_() for table in tables)
    ours, theirs = resized_by_products(mine, grid), F.interpolate(other, size=grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for out in (ours, theirs):
        (out * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert resized_by_products(mine.detach().float(), grid).dtype == torch.float32


def test_an_operation_without_a_deterministic_form_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    one_line = r"^--deterministic: put_ has no deterministic form on this device; .*$"
    with pytest.raises(ConfigError, match=one_line), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="inconsistent"), deterministic(True):
        torch.zeros(2) @ torch.zeros(3)


def test_what_cannot_repeat_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    needed = "--deterministic needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, not ':0:0'"
    with pytest.raises(ConfigError, match=needed), deterministic(True):
        raise AssertionError("entered")
    with deterministic(False):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"
    compiled = read_run("demo_stage1", ["--deterministic", "--teachers.compile"])
    with pytest.raises(ConfigError, match="--deterministic: a compiled teacher is tuned by the clock"):
        check_recipe(compiled)
    check_recipe(replace(compiled, deterministic=False))
    check_recipe(replace(compiled, teachers=replace(compiled.teachers, source="store", store="x")))
