from __future__ import annotations

import pytest
import torch

from cogvit.objective.distill import TargetError, target_error


@pytest.mark.parametrize(
    ("kind", "expected"), [("smooth_l1", [0.5 * (0.125 + 2.5), 0.0]), ("mse", [4.625, 0.0]), ("cosine", [1.8, 0.0])]
)
def test_errors_of_a_head(kind: TargetError, expected: list[float]) -> None:
    guess_MC = torch.tensor([[0.5, 3.0], [2.0, 1.0]])
    target_MC = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    if kind == "cosine":
        guess_MC, target_MC = torch.tensor([[3.0, 4.0], [2.0, 1.0]]), torch.tensor([[0.0, -1.0], [4.0, 2.0]])
    torch.testing.assert_close(target_error(kind, guess_MC, target_MC), torch.tensor(expected), atol=1e-6, rtol=0)
