"""A copy of a rank's state for a checkpoint: where it lies does not follow the state."""

from __future__ import annotations

import torch

from cogvit.training.snapshot import Snapshot
from cogvit.training.zero import Fragment


def test_a_snapshot_keeps_what_training_goes_on_to_change() -> None:
    values = torch.arange(10.0)
    fragments = [
        Fragment("one", "master", torch.Size([2, 3]), 0, values[:6]),
        Fragment("none", "master", torch.Size([4]), 0, values[:0]),
        Fragment("two", "momentum", torch.Size([8]), 4, values[6:]),
    ]
    snapshot = Snapshot(torch.device("cpu"))
    first = snapshot.take(fragments)
    values.mul_(2.0)
    second = snapshot.take(fragments)
    assert [(one.name, one.kind, one.start, one.shape) for one in first] == [
        (one.name, one.kind, one.start, one.shape) for one in fragments
    ]
    assert [one.values.tolist() for one in first] == [[0, 1, 2, 3, 4, 5], [], [6, 7, 8, 9]]
    assert [one.values.tolist() for one in second] == [[0, 2, 4, 6, 8, 10], [], [12, 14, 16, 18]]
