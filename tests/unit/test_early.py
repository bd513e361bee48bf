"""The order in which gradients are sent while backward still runs."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from cogvit.parallel.early import EarlyGradients


def test_gradients_are_sent_once_in_one_order_as_soon_as_that_allows() -> None:
    first, second, third, unused = (Parameter(torch.ones(())) for _ in range(4))
    sent: list[Parameter] = []
    early = EarlyGradients([first, second, third, unused], sent.append)
    (first * second * third).backward()  # not the last pass: nobody has begun
    assert not sent
    loss = third * (first * 2.0) + second  # the gradient of the second comes before that of the third
    early.begin(loss)
    loss.backward()
    early.end()
    assert sent == [third, second, first] and early.sent == {first, second, third}
    unused.backward()
    early.forget()
    assert len(sent) == 3 and not early.sent


def test_what_a_loss_reaches_waits_for_nothing_that_it_does_not() -> None:
    tower, other = Parameter(torch.ones(())), Parameter(torch.ones(()))
    sent: list[Parameter] = []
    early = EarlyGradients([tower, other], sent.append)
    for parameter in (tower, other):
        loss = parameter * 3.0
        early.begin(loss)
        loss.backward()
        early.end()
    assert sent == [tower, other]
