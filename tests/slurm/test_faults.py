"""Runs that are disturbed end with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.jobs import STAGE2, Site, assert_same_end, progress
from tests.slurm.lab import wait_for

STEPS, EVERY = 40, 2
LENGTH = ("--schedule.steps", str(STEPS), "--checkpoint.every-steps", str(EVERY))
SMALL_STAGE2 = (*STAGE2, "--parallel.pp", "2", *LENGTH)
RANKS = r"^[^ ]*python[^ ]* -m cogvit\.train"  # and not the srun that started them
# One rank a node: a start costs ten seconds of a core for each rank, and here are eight starts.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--signal=B:USR1@60")

pytestmark = pytest.mark.timeout(2400)
Fault = Callable[[Site, int], None]


@contextmanager
def frozen(site: Site, job: int) -> Iterator[None]:
    """Stop the ranks' clocks while Slurm takes its time to notice something."""
    nodes = site.nodes_of(job)
    for node in nodes:
        site.lab.on(node, "pkill", "-STOP", "--full", RANKS)
    yield
    for node in nodes:
        site.lab.on(node, "pkill", "-CONT", "--full", RANKS)


def requeue(site: Site, job: int) -> None:
    site.lab.run("scontrol", "requeue", str(job))


def preempt(site: Site, job: int) -> None:
    """A job of a partition with a higher priority takes all nodes for a moment."""
    site.lab.run("sbatch", "-p", "urgent", "--nodes=4", "--exclusive", "--wrap", "sleep 3")


def reach_the_time_limit(site: Site, job: int) -> None:
    """Bring the limit near: one minute before it the batch script is told. Then lift it again."""
    with frozen(site, job):
        minutes = site.lab.run("squeue", "-h", "-j", str(job), "-o", "%M").strip().split(":")[0]
        site.lab.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 2}")
        wait_for(lambda: "stopping: the time limit is near" in site.output(job), 120, "the warning")
    wait_for(lambda: site.lab.job(job).state == "PENDING", 120, "the requeue before the time limit")
    site.lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def kill_a_rank(site: Site, job: int) -> None:
    node = site.nodes_of(job)[-1]
    site.lab.on(node, "pkill", "-KILL", "--oldest", "--full", RANKS)


def kill_a_node(site: Site, job: int) -> None:
    """The node is away until the job runs on others."""
    node, starts = site.nodes_of(job)[-1], site.lab.job(job).restarts + 1
    site.lab.kill_node(node)
    wait_for(lambda: f"start {starts + 1}:" in site.output(job), 240, "the restart elsewhere")
    site.lab.start_node(node)


GRACEFUL: list[Fault] = [requeue, preempt, reach_the_time_limit]
HARD: list[Fault] = [kill_a_rank, kill_a_node]


@pytest.fixture(scope="module")
def quiet(site: Site) -> Path:
    """Stage 2 on two nodes, undisturbed."""
    site.finish(site.submit(TWO_NODES, (*SMALL_STAGE2, "--out", "runs/quiet")))
    return site.directory / "runs" / "quiet"


def disturb(site: Site, job: int, out: str, fault: Fault) -> None:
    """Do something to a job that has made progress since its last start, and see what it lost."""
    run = site.directory / out
    before = site.lab.job(job).restarts
    first = progress(run)[1] if (run / "checkpoints").exists() else 0
    site.wait_for_step(job, out, first + EVERY + 2)  # more than a hard end loses
    fault(site, job)
    wait_for(lambda: f"start {before + 2}:" in site.output(job), 240, f"the restart after {fault.__name__}")
    done, saved = progress(run)
    # A save is written beside the next step, which a hard end can lose too.
    assert done - saved <= (0 if fault in GRACEFUL else EVERY + 1), f"{fault.__name__}\n{site.output(job)}"


@pytest.mark.parametrize("faults", [GRACEFUL, HARD], ids=["asked", "struck"])
def test_a_disturbed_run_ends_with_the_same_bits(site: Site, quiet: Path, faults: list[Fault]) -> None:
    out = f"runs/disturbed-{len(faults)}"
    job = site.submit(TWO_NODES, (*SMALL_STAGE2, "--out", out))
    for fault in faults:
        disturb(site, job, out, fault)
    assert site.finish(job).restarts == len(faults)
    assert_same_end(site.directory / out, quiet)
