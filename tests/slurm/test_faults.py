"""Runs that are disturbed end with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.jobs import STAGE2, TP2_PP2, Site, assert_same_end, progress
from tests.slurm.lab import wait_for

STEPS, EVERY = 40, 4
LENGTH = ("--schedule.steps", str(STEPS), "--checkpoint.every-steps", str(EVERY))
SMALL_STAGE2 = (*STAGE2, *TP2_PP2, *LENGTH)
TWO_NODES = ("--nodes=2", "--signal=B:USR1@60")

pytestmark = pytest.mark.timeout(2400)
Fault = Callable[[Site, int], None]


def requeue(site: Site, job: int) -> None:
    site.lab.run("scontrol", "requeue", str(job))


def preempt(site: Site, job: int) -> None:
    """A job of a partition with a higher priority takes all nodes for a moment."""
    site.lab.run("sbatch", "-p", "urgent", "--nodes=4", "--exclusive", "--wrap", "sleep 3")


def reach_the_time_limit(site: Site, job: int) -> None:
    """Make the limit one minute away, which is when the batch script asked to be told, and lift it again."""
    minutes = site.lab.run("squeue", "-h", "-j", str(job), "-o", "%M").strip().split(":")[0]
    site.lab.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 1}")
    wait_for(lambda: site.lab.job(job).state == "PENDING", 120, "the requeue before the time limit")
    site.lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def kill_a_rank(site: Site, job: int) -> None:
    node = site.nodes_of(job)[-1]
    site.lab.on(node, "pkill", "-KILL", "--oldest", "--full", "-m cogvit.train")


def kill_a_node(site: Site, job: int) -> None:
    node = site.nodes_of(job)[-1]
    site.lab.kill_node(node)
    wait_for(lambda: site.lab.job(job).state == "PENDING" or site.lab.job(job).restarts > 0, 120, "the requeue")
    site.lab.start_node(node)


GRACEFUL: list[Fault] = [requeue, preempt, reach_the_time_limit]
HARD: list[Fault] = [kill_a_rank, kill_a_node]


@pytest.fixture(scope="module")
def straight2(site: Site) -> Path:
    """Stage 2 on two nodes, undisturbed."""
    site.finish(site.submit(TWO_NODES, (*SMALL_STAGE2, "--out", "runs/straight2")))
    return site.directory / "runs" / "straight2"


def disturb(site: Site, job: int, out: str, fault: Fault) -> None:
    """Do something to a job that has made progress since its last start, and see what it lost."""
    run = site.directory / out
    before = site.lab.job(job).restarts
    first = progress(run)[1] if (run / "checkpoints").exists() else 0
    site.wait_for_step(job, out, first + EVERY + 2)
    fault(site, job)
    wait_for(lambda: site.lab.job(job).restarts > before, 180, f"the restart after {fault.__name__}")
    done, saved = progress(run)
    # A save is written beside the next step, which a hard end can lose too.
    assert done - saved <= (0 if fault in GRACEFUL else EVERY + 1), f"{fault.__name__}\n{site.output(job)}"


def test_one_run_through_every_fault(site: Site, straight2: Path) -> None:
    out = "runs/disturbed2"
    job = site.submit(TWO_NODES, (*SMALL_STAGE2, "--out", out))
    for fault in (*GRACEFUL, *HARD):
        disturb(site, job, out, fault)
    ended = site.finish(job)
    assert ended.restarts == 5
    assert_same_end(site.directory / out, straight2)
