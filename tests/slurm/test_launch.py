"""sbatch launch/stage1.sh, stage2.sh and stage3.sh over several nodes, as a user runs them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cogvit.config import EvalConfig, ParallelConfig
from cogvit.training.meter import read_metrics
from tests.conversations import indexed, preset, stage3, write_language_model, write_talks
from tests.e2e.test_own_shards import train_on_rank
from tests.pool import Pool
from tests.slurm.jobs import ROOT, STAGE2, STEPS, Site, assert_same_end, mounted

SWITCH = {"node1": "leaf1", "node3": "leaf1", "node2": "leaf2", "node4": "leaf2"}

pytestmark = pytest.mark.timeout(1200)


def test_ranks_are_numbered_along_the_switches(site: Site, straight: Path) -> None:
    logs = site.rank_logs(str(straight))
    assert sorted(logs) == list(range(8))
    order = ["node1", "node3", "node2", "node4"]  # leaf1, then leaf2
    for rank, log in logs.items():
        tp, pp, dp = ParallelConfig(tp=2, pp=2).place(rank)
        node = order[rank // 2]
        assert (
            log.splitlines()[0] == f"rank={rank} tp={tp} pp={pp} dp={dp} device=cpu node={node} switch={SWITCH[node]}"
        )
    assert f"step {STEPS}/{STEPS} loss" in logs[0]


def test_teachers_ran_on_every_node(site: Site, straight: Path) -> None:
    workers = (straight / "logs" / "ray-workers.log").read_text()
    assert workers.count("Ray runtime started") == 3
    assert "Ray runtime started" in (straight / "logs" / "ray-head.log").read_text()
    assert not list((straight / "logs").glob(".ray-token*"))


def test_stage_2_follows(straight2: Path) -> None:
    assert [line["step"] for line in read_metrics(straight2 / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_stage_3_goes_on_after_a_requeue(site: Site, pool: Pool) -> None:
    """A pipeline of two nodes; the weights are those of two undisturbed ranks elsewhere, to the bit."""
    here = site.directory / "stage3"
    indexed(write_talks(here / "shards"))
    config = stage3(here / "shards", write_language_model(here / "language"))
    config = replace(config, schedule=replace(config.schedule, steps=40), parallel=ParallelConfig(pp=2))
    config = replace(config, eval=EvalConfig(every_steps=0))
    command = ("launch/stage3.sh", preset(here, config), "--out", "runs/stage3")
    job = site.submit(("--nodes=2", "--ntasks-per-node=1"), command)
    site.wait_for_step(job, "runs/stage3", 4)
    site.lab.run("scontrol", "requeue", str(job))
    undisturbed = here / "undisturbed"
    argv = [preset(here, config), "--out", str(undisturbed)]
    assert pool.run(train_on_rank, 2, (argv,), timeout_s=300.0) == [0, 0]
    assert site.finish(job).restarts == 1
    assert_same_end(site.directory / "runs" / "stage3", undisturbed)


@pytest.mark.long
def test_batch_servers_on_two_nodes_feed_as_the_ranks_themselves(site: Site) -> None:
    """A replica on each node: its two tensor ranks take their batches from the node's own actor."""
    outs = [f"runs/{loading}" for loading in ("in_process", "server")]
    for out in outs:
        flags = ("--parallel.tp", "2", "--data.loading", Path(out).name, "--out", out)
        job = site.submit(("--nodes=2",), (*STAGE2, *flags))
        site.finish(job)
        assert f"loading: {Path(out).name}" in site.output(job)
    assert_same_end(*(site.directory / out for out in outs))
    assert "Ray runtime started" in (site.directory / outs[1] / "logs" / "ray-workers.log").read_text()
    assert not list((site.directory / outs[0] / "logs").glob("ray-*.log"))


def test_the_chain_waits_for_each_stage(site: Site) -> None:
    said = site.command(
        "launch/chain.sh", "runs/chain", "--begin=now+1hour", "--gpus-per-node=0", "--ntasks-per-node=1"
    )
    numbers = re.fullmatch(r"precompute (\d+), stage 1 (\d+), stage 2 (\d+)\n", said)
    assert numbers is not None, said
    first, second, third = numbers.groups()
    for job, before in ((second, first), (third, second)):
        assert f"Dependency=afterok:{before}(unfulfilled)" in site.lab.run("scontrol", "show", "job", job)
    site.lab.run("scancel", first, second, third)


def test_a_run_that_cannot_get_on_is_given_up(site: Site) -> None:
    """A rate that no weight survives; the job is started again once, and no more. Its name is not srun's to expand."""
    flags = (
        "--optim.lr",
        "1e30",
        "--optim.adamw-lr",
        "1e30",
        "--checkpoint.every-steps",
        "0",
        "--out",
        "runs/50%Nless",
    )
    job = site.submit(("--nodes=1", "--ntasks-per-node=1"), (*STAGE2, *flags), {"MAX_RESTARTS": "1"})
    ended = site.lab.wait(job, 600)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 1, 1), site.output(job)
    assert "restart 1 of 1 without a new checkpoint" in site.output(job)
    assert "ended with status 1, 2 times since the start; not started again" in site.output(job)
    assert sorted(site.rank_logs("runs/50%Nless")) == [0]


def test_a_node_that_keeps_failing_is_excluded(site: Site, tmp_path: Path) -> None:
    """The ranks of one node die at once, twice; the third start goes without it and reaches the end."""
    broken = tmp_path / "train.py"
    broken.write_text("import os\nos._exit(7)\n")
    out, node = site.directory / "runs" / "excluded", "node3"
    with mounted(site, node, broken, ROOT / "cogvit" / "train.py"):
        job = site.submit(("--nodes=2", "--ntasks-per-node=1"), (*STAGE2, "--out", "runs/excluded"))
        ended = site.finish(job)
    assert (ended.restarts, ended.excluded) == (2, node), site.output(job)
    assert (out / "logs" / f"failed_nodes.{job}").read_text().split()[1::2] == [node, node]
    printed = site.output(job)
    assert (
        f"requeued: failed with status 7 on {node}, restart 2 of 3 without a new checkpoint; without {node}" in printed
    )
    assert node in printed.split("start 2:")[1] and node not in printed.split("start 3:")[1]
