"""A run changes its nodes and its layout on the way, and reads its teachers' features from a store."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cogvit.training.checkpoint import folder_of, latest, read_state
from cogvit.training.meter import read_metrics
from tests.slurm.jobs import SBATCH, SMALL, STAGE2_ADAMW, STEPS, TEACHERS, TP2_PP2, Site
from tests.slurm.lab import wait_for

pytestmark = pytest.mark.timeout(3600)


def losses_of(run: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]


def stop(site: Site, job: int) -> None:
    """Ask a job to save, and take it out of the queue into which it puts itself."""
    site.lab.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: "requeued:" in site.output(job), 240, "the save")
    site.lab.run("scancel", str(job))
    site.lab.wait(job, 120)  # it may have begun again


@pytest.mark.long
def test_another_layout_takes_the_run_over_and_gives_it_back(site: Site, straight: Path, straight2: Path) -> None:
    """Four nodes at tp=2, pp=2, dp=2; two at tp=1, pp=1, dp=4; four again: the losses are those of one layout."""
    stage2 = (*STAGE2_ADAMW, "--init", str(straight), "--out", "runs/layouts")
    for nodes, layout, until in (("4", TP2_PP2, 2), ("2", (), 4), ("4", TP2_PP2, STEPS)):
        job = site.submit((f"--nodes={nodes}",), (*stage2, *layout))
        if until < STEPS:
            site.wait_for_step(job, "runs/layouts", until)
            stop(site, job)
        else:
            site.finish(job)
    changed = site.directory / "runs" / "layouts"
    mine, theirs = losses_of(changed), losses_of(straight2)
    assert [step for step, _ in mine] == [step for step, _ in theirs] == list(range(1, STEPS + 1))
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-6)
    # What was seen is the same too: the plan, the place in it, the images and their patches.
    ends = [latest(folder_of(run)) for run in (changed, straight2)]
    states = [read_state(end) for end in ends if end is not None]
    assert len({(state.step, state.position, state.images, state.tokens) for state in states}) == 1 < len(states)


@pytest.mark.long
def test_the_chain_runs_and_its_stage_1_is_that_of_teachers_online(site: Site, straight: Path) -> None:
    presets = {"PRESET1": "demo_stage1", "PRESET2": "demo_stage2"}
    flags = {"FLAGS1": shlex.join((*SMALL, *TEACHERS, *TP2_PP2)), "FLAGS2": shlex.join((*SMALL, *TP2_PP2))}
    said = site.command("launch/chain.sh", "runs/chain", *SBATCH, env=presets | flags)
    features, stage1, stage2 = (int(number) for number in re.findall(r"\d+(?=,|\n)", said))
    site.finish(features)
    site.finish(stage1)
    site.finish(stage2)
    chain = site.directory / "runs" / "chain"
    workers = (chain / "features" / "logs" / "ray-workers.log").read_text()
    assert workers.count("Ray runtime started") == 3
    assert "teachers: store" in site.output(stage1) and not list((chain / "stage1" / "logs").glob("ray-*"))
    mine, theirs = losses_of(chain / "stage1"), losses_of(straight)
    # Batch mates change a feature's last bits, and here the statistics of them all.
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
    assert [step for step, _ in losses_of(chain / "stage2")] == list(range(1, STEPS + 1))
    # The same command has nothing left to do.
    again = site.submit((), ("launch/precompute.sh", "demo_stage1", *SMALL, *TEACHERS, "--out", "runs/chain/features"))
    site.finish(again)
