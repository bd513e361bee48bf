"""The losses of reinforcement learning against a loop over answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cogvit.objective.policy import Answers, Clipping, PolicyLoss, advantages, policy_loss

LENGTHS = [3, 1, 5, 2]


def test_advantages_are_standard_scores_of_a_group() -> None:
    reward, group = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.25, 0.0]), torch.tensor([0, 1, 1, 0, 2, 3])
    assert advantages(reward, group).tolist() == pytest.approx([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    assert not advantages(torch.full((4,), 0.3), torch.zeros(4, dtype=torch.int64)).any()
    assert not advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).numel()


def answers_of(seed: int) -> tuple[Tensor, Answers]:
    g = torch.Generator().manual_seed(seed)
    answer = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    old, new, reference = (-torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(4, generator=g, dtype=torch.float64)
    return new.requires_grad_(), Answers(answer, old, advantage, reference)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize(("kl_weight", "dual"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.5)])
def test_a_loss_is_that_of_a_loop(kind: PolicyLoss, kl_weight: float, dual: float) -> None:
    clipping = Clipping(kind, low=0.2, high=0.3, kl_weight=kl_weight, dual=dual)
    for seed in range(10):
        new, answers = answers_of(seed)
        loss, report = policy_loss(new, answers, clipping)
        expected, held = 0.0, 0.0
        assert answers.reference is not None
        for place, length in enumerate(LENGTHS):
            rows = range(sum(LENGTHS[:place]), sum(LENGTHS[: place + 1]))
            moved = [float(new.detach()[row] - answers.logprob[row]) for row in rows]
            if kind == "gspo":
                moved = [sum(moved) / length] * length
            worth = float(answers.advantage[place])
            for row, move in zip(rows, moved, strict=True):
                ratio = math.exp(move)
                clipped = min(max(ratio, 0.8), 1.3)
                gain = min(ratio * worth, clipped * worth)
                if dual and worth < 0.0:
                    gain = max(gain, dual * worth)
                expected -= gain / length
                held += (gain != ratio * worth) / length
                apart = float(answers.reference[row] - new.detach()[row])
                expected += kl_weight * (math.exp(apart) - apart - 1.0) / length
        assert float(loss.detach()) == pytest.approx(expected) and float(report["clipped"]) == pytest.approx(held)
        assert ("kl" in report) == (kl_weight > 0.0)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_the_first_step_is_the_policy_gradient(kind: PolicyLoss) -> None:
    new, answers = answers_of(0)
    same = Answers(answers.answer, new.detach(), answers.advantage)
    loss, report = policy_loss(new, same, Clipping(kind))
    loss.backward()
    lengths = torch.tensor(LENGTHS)[answers.answer]
    torch.testing.assert_close(new.grad, -(answers.advantage[answers.answer] / lengths))
    assert float(report["ratio"]) == 4.0 and not report["clipped"]


def test_what_is_clipped_teaches_nothing() -> None:
    answer, old = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    new = torch.tensor([0.5, 0.0], requires_grad=True)
    policy_loss(new, Answers(answer, old, torch.tensor([1.0])), Clipping())[0].backward()
    assert new.grad is not None and new.grad.tolist() == [0.0, -0.5]


def test_a_bad_answer_that_has_become_many_times_as_likely_has_no_say() -> None:
    answer, old = torch.arange(2), torch.zeros(2)
    for dual, expected in ((0.0, math.e**5), (3.0, 0.0)):
        new = torch.tensor([5.0, 0.5], requires_grad=True)
        policy_loss(new, Answers(answer, old, torch.tensor([-1.0, -1.0])), Clipping(dual=dual))[0].backward()
        assert new.grad is not None and new.grad.tolist() == pytest.approx([expected, math.e**0.5])


@pytest.mark.parametrize("options", [{"kind": "ppo"}, {"low": 0.0}, {"high": -1.0}, {"kl_weight": -0.1}, {"dual": 1.1}])
def test_values_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Clipping(**options)  # type: ignore[arg-type]
