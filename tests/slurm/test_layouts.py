"""A run changes its nodes and its layout on the way, and reads its teachers' features from a store; marked long."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvit.training.checkpoint import folder_of, latest, read_state
from cogvit.training.meter import read_metrics
from tests.slurm.jobs import SMALL, STAGE1, STAGE2, STEPS, TEACHERS, TP2_PP2, Site
from tests.slurm.lab import wait_for

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long]


def losses_of(run: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]


def stop(site: Site, job: int) -> None:
    """Ask a job to save, and take it out of the queue into which it puts itself."""
    site.lab.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: "requeued:" in site.output(job), 240, "the save")
    site.lab.run("scancel", str(job))
    site.lab.wait(job, 120)  # it may have begun again


def test_another_layout_takes_the_run_over_and_gives_it_back(site: Site) -> None:
    """Four nodes at tp=2, pp=2, dp=2; two at tp=1, pp=1, dp=4; four again: the losses are those of one layout."""
    stage2 = (*STAGE2, "--optim.name", "adamw")
    site.finish(site.submit((), (*stage2, *TP2_PP2, "--out", "runs/one-layout")))

    for nodes, layout, until in (("4", TP2_PP2, 2), ("2", (), 4), ("4", TP2_PP2, STEPS)):
        job = site.submit((f"--nodes={nodes}",), (*stage2, *layout, "--out", "runs/layouts"))
        if until < STEPS:
            site.wait_for_step(job, "runs/layouts", until)
            stop(site, job)
        else:
            site.finish(job)
    changed, straight = (site.directory / "runs" / name for name in ("layouts", "one-layout"))
    mine, theirs = losses_of(changed), losses_of(straight)
    assert [step for step, _ in mine] == [step for step, _ in theirs] == list(range(1, STEPS + 1))
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-6)
    # What was seen is the same too: the plan, the place in it, the images and their patches.
    ends = [latest(folder_of(run)) for run in (changed, straight)]
    states = [read_state(end) for end in ends if end is not None]
    assert len({(state.step, state.position, state.images, state.tokens) for state in states}) == 1 < len(states)


def test_stage_1_reads_what_precompute_wrote(site: Site, straight: Path) -> None:
    site.finish(site.submit((), ("launch/precompute.sh", "demo_stage1", *SMALL, *TEACHERS, "--out", "runs/features")))
    workers = (site.directory / "runs" / "features" / "logs" / "ray-workers.log").read_text()
    assert workers.count("Ray runtime started") == 3
    store = ("--teachers.source", "store", "--teachers.store", "runs/features")
    job = site.submit((), (*STAGE1, *TP2_PP2, *store, "--out", "runs/from-store"))
    site.finish(job)
    run = site.directory / "runs" / "from-store"
    assert "teachers: store" in site.output(job) and not list((run / "logs").glob("ray-*"))
    mine, theirs = losses_of(run), losses_of(straight)
    # Batch mates change a feature's last bits, and here the statistics of them all.
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
    # The same command has nothing left to do.
    again = site.submit((), ("launch/precompute.sh", "demo_stage1", *SMALL, *TEACHERS, "--out", "runs/features"))
    site.finish(again)
