"""What a policy learns from answers and their rewards: advantages in a group, and the clipped losses of GRPO and GSPO.

Shape letters beyond the project's: A answers of a batch, R tokens of all answers.
Source: GRPO, arXiv 2402.03300; GSPO, arXiv 2507.18071; the second clip, arXiv 1912.09729; the estimate of the
divergence, "k3", is Schulman's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PolicyLoss = Literal["grpo", "gspo"]


@dataclass(frozen=True)
class Clipping:
    """How far the policy may move from the one that answered before it learns nothing more.

    Attributes:
        kind: `grpo` looks at the ratio of each token, `gspo` at that of the whole answer, its geometric mean.
        low: how far the ratio may fall below 1.
        high: how far it may rise above 1.
        kl_weight: of the divergence from a reference policy, in nats a token; 0 has no reference.
        dual: the ratio from which an answer worse than its group teaches nothing more, above 1 + high; 0: never.
    """

    kind: PolicyLoss = "grpo"
    low: float = 0.2
    high: float = 0.2
    kl_weight: float = 0.0
    dual: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("grpo", "gspo"):
            raise ValueError(f"kind={self.kind!r} must be grpo or gspo")
        if not (0.0 < self.low <= 1.0 and self.high > 0.0 and self.kl_weight >= 0.0):
            raise ValueError(
                f"low={self.low} must be in (0, 1], high={self.high} above 0 and kl_weight={self.kl_weight} at least 0"
            )
        if self.dual and not self.dual > 1.0 + self.high:
            raise ValueError(f"dual={self.dual} must be above 1 + high={1.0 + self.high:g}, or 0")


@dataclass(frozen=True)
class Answers:
    """Tokens of A answers end to end.

    Attributes:
        answer: [R] int64, which answer each token is of.
        logprob: [R], of the policy that answered.
        advantage: [A].
        reference: [R], of the reference policy; None without one.
    """

    answer: Tensor
    logprob: Tensor
    advantage: Tensor
    reference: Tensor | None = None


def advantages(reward_A: Tensor, group_A: Tensor) -> Tensor:
    """Return how much better each answer is than those to the same prompt, [A], in standard deviations of the group.

    A group whose rewards are equal, one of a single answer among them, teaches nothing: 0.

    Args:
        reward_A: of each answer.
        group_A: int64, which prompt each answers, from 0.
    """
    num_groups = int(group_A.max()) + 1 if len(group_A) else 0
    size_G = torch.bincount(group_A, minlength=num_groups).clamp(min=1)

    def mean(value_A: Tensor) -> Tensor:
        return (value_A.new_zeros(num_groups).index_add(0, group_A, value_A) / size_G)[group_A]

    apart_A = reward_A - mean(reward_A)
    spread_A = mean(apart_A.square()).sqrt()
    return torch.where(spread_A > 1e-6, apart_A / spread_A.clamp(min=1e-6), 0.0)


def policy_loss(logprob_R: Tensor, answers: Answers, clipping: Clipping) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over answers of the clipped loss, each a mean over its tokens, and sums to report (0-dim).

    "clipped" and "ratio" are sums over answers of the share of tokens that clipping holds back and of the mean ratio,
    "kl" that of the mean divergence from the reference.

    Args:
        logprob_R: of the policy that learns.
        answers: what was answered, and its worth.
        clipping: the loss.
    """
    num_answers = len(answers.advantage)
    length_A = torch.bincount(answers.answer, minlength=num_answers).clamp(min=1)

    def mean(value_R: Tensor) -> Tensor:
        return value_R.new_zeros(num_answers).index_add(0, answers.answer, value_R) / length_A

    moved_R = logprob_R - answers.logprob
    if clipping.kind == "gspo":
        moved_R = mean(moved_R)[answers.answer]
    ratio_R, advantage_R = moved_R.exp(), answers.advantage[answers.answer]
    free_R = ratio_R * advantage_R
    held_R = ratio_R.clamp(1.0 - clipping.low, 1.0 + clipping.high) * advantage_R
    gain_R = torch.minimum(free_R, held_R)
    if clipping.dual:  # the smaller of the two has no floor where a bad answer has become many times as likely
        gain_R = torch.where(advantage_R < 0.0, gain_R.maximum(clipping.dual * advantage_R), gain_R)
    loss_R = -gain_R
    report = {
        "clipped": mean((gain_R != free_R).to(ratio_R.dtype)).sum().detach(),
        "ratio": mean(ratio_R).sum().detach(),
    }
    if answers.reference is not None and clipping.kl_weight > 0.0:
        apart_R = answers.reference - logprob_R
        divergence_R = apart_R.exp() - apart_R - 1.0
        loss_R = loss_R + clipping.kl_weight * divergence_R
        report["kl"] = mean(divergence_R).sum().detach()
    return mean(loss_R).sum(), report
