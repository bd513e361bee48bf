"""The loss over the labels that count: logits are kept for backward, or made again, and nothing else differs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.parallel.vocabulary import loss_in_chunks


def test_logits_that_are_made_again_are_those_that_would_be_kept() -> None:
    torch.manual_seed(0)
    hidden_SD, head_VD = torch.randn(3000, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    label_S, weight_S = torch.randint(50, (3000,)), (torch.rand(3000) < 0.9).float()

    def chunk_loss(hidden_RD: Tensor, label_R: Tensor, weight_R: Tensor) -> Tensor:
        loss_R = F.cross_entropy(hidden_RD @ head_VD.T, label_R, reduction="none")
        return (loss_R * weight_R).sum()

    found, kept = [], {True: 0, False: 0}
    for keeps in kept:

        def count(x: Tensor, keeps: bool = keeps) -> Tensor:
            kept[keeps] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = loss_in_chunks(chunk_loss, hidden_SD, label_S, weight_S, None, keeps=keeps)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden_SD, head_VD))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert kept[True] > 2700 * 50 / 2 > kept[False]
