"""What a person sees on a terminal: the command's own lines, and none of a dependency, at start and end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.corpus import write_shards
from tests.e2e.quiet import noise_of, on_terminal
from tests.e2e.test_commands import ROOT, SMALL, environment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quiet")
    write_shards(directory / "shards", "numbers-00000", 48)
    write_shards(directory / "heldout", "numbers-00000", 16, first_seed=1000)
    return directory


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.timeout(400)
def test_training_shows_its_own_lines_alone(world: Path, processes: int) -> None:
    """One process as a reader starts it, and two: a bar that ends, held-out figures and a checkpoint."""
    start = [sys.executable, "-m", "cogvit.train"] if processes == 1 else [str(ROOT / "launch/local.sh"), "2"]
    flags = ["--data.shards", "shards", "--data.eval-shards", "heldout", *SMALL, "--eval.every-steps", "2"]
    command = [*start, "demo_stage2", *flags, "--schedule.steps", "4", "--out", f"runs/{processes}"]
    status, shown = on_terminal(command, world, environment() | {"PYTHONPATH": str(ROOT)})
    assert status == 0, shown
    assert noise_of(shown) == []
    assert shown.startswith("device: ") and "data: 48 images in 1 shards" in shown and "4/4" in shown


def test_noise_is_known_as_such() -> None:
    shown = (
        "data: 48 images\r\nstep 1/4 loss 2.0\rstep 2/4\r/x/site-packages/torch/y.py:3: FutureWarning: z\r\n"
        "[W1130 01:02:03 socket.cpp:1] told\r\nwarning: 100% of the images are made smaller\r\n(Actor pid=12) hello\r\n"
    )
    assert [line[:10] for line in noise_of(shown)] == ["/x/site-pa", "[W1130 01:", "(Actor pid"]
