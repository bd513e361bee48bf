"""What cannot run is said in the job's first lines, and the job is not tried again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogvit.config import to_json
from cogvit.stages import read_run
from cogvit.training.lock import run_lock
from tests.slurm.jobs import STAGE2, TP2_PP2, Site, mounted

pytestmark = pytest.mark.timeout(300)


def refused(site: Site, options: tuple[str, ...], command: tuple[str, ...]) -> str:
    """Submit; the job leaves with 2 and is not requeued. Returns what it printed."""
    job = site.submit(options, command)
    ended = site.lab.wait(job, 240)
    output = site.output(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), output
    assert "requeued" not in output
    return output


def test_a_node_count_that_the_layout_does_not_fit(site: Site) -> None:
    output = refused(site, ("--nodes=3",), (*STAGE2, *TP2_PP2, "--out", "runs/three"))
    assert "error: 6 processes cannot be split into tp=2 x pp=2" in output


def test_tensor_ranks_on_two_nodes(site: Site) -> None:
    output = refused(site, ("--nodes=4", "--ntasks-per-node=1"), (*STAGE2, "--parallel.tp", "2", "--out", "runs/split"))
    assert "error: --parallel.tp 2 does not divide 1 tasks per node" in output


def test_tasks_that_are_no_whole_number_of_nodes(site: Site) -> None:
    """Lightning#20391: --ntasks beside --ntasks-per-node was ignored without a word."""
    output = refused(site, ("--nodes=2", "--ntasks=3"), (*STAGE2, "--out", "runs/tasks"))
    assert "error: sbatch was given 3 tasks, and 2 nodes of 2 are 4; pass --ntasks-per-node, not --ntasks" in output


def test_an_output_that_one_node_cannot_write(site: Site) -> None:
    out = site.directory / "runs" / "readonly"
    out.mkdir(parents=True)
    with mounted(site, "node3", out, out):
        output = refused(site, ("--nodes=4",), (*STAGE2, *TP2_PP2, "--out", "runs/readonly"))
    assert "error: node3: --out runs/readonly cannot be written" in output


def test_a_node_without_a_module(site: Site, tmp_path: Path) -> None:
    with mounted(site, "node2", tmp_path, Path(pytest.__file__).parents[1] / "deepspeed"):
        output = refused(site, ("--nodes=4",), (*STAGE2, *TP2_PP2, "--out", "runs/module"))
    assert "error: node2: " in output and "lacks deepspeed" in output


def test_a_node_without_the_venv(site: Site, tmp_path: Path) -> None:
    job = site.submit(("--nodes=2",), (*STAGE2, *TP2_PP2, "--out", "runs/venv"), {"PYTHON": str(tmp_path / "python")})
    assert site.lab.wait(job, 60).exit_code == 2
    assert f"error: node1: PYTHON={tmp_path}/python does not start" in site.output(job)


def test_a_clock_that_is_wrong_is_told_and_nothing_more(site: Site, tmp_path: Path) -> None:
    wrong = tmp_path / "date"
    wrong.write_text("#!/bin/sh\necho 1000\n")
    wrong.chmod(0o755)
    with mounted(site, "node4", wrong, Path("/usr/bin/date")):
        # With a mistake further on, so that the job ends here.
        output = refused(site, ("--nodes=4",), (*STAGE2, "--parallel.tp", "3", "--out", "runs/clock"))
    assert "warning: the clock of node4 is -" in output and "error: " in output


def test_a_run_that_is_running(site: Site) -> None:
    out = site.directory / "runs" / "running"
    (out / "logs").mkdir(parents=True)
    with run_lock(out):
        output = refused(site, ("--nodes=1",), (*STAGE2, "--parallel.tp", "2", "--out", "runs/running"))
    assert "error: --out runs/running is in use by process " in output
    assert not list((out / "logs").glob("rank_*"))  # said before the ranks start


def test_a_run_of_another_model(site: Site) -> None:
    out = site.directory / "runs" / "other"
    (out / "logs").mkdir(parents=True)
    flags = (*STAGE2, "--out", "runs/other")
    another = read_run(flags[1], [*flags[2:], "--vision.depth", "8"])
    (out / "config.json").write_text(json.dumps(to_json(another)))
    # Without a step the directory would be free.
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    output = refused(site, ("--nodes=1",), (*flags, "--parallel.tp", "2"))
    assert "error: runs/other holds another run (vision.depth: 8 -> 4)" in output
