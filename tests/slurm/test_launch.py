"""sbatch launch/stage1.sh and launch/stage2.sh over four nodes, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvit.config import ParallelConfig
from cogvit.training.meter import read_metrics
from tests.slurm.jobs import STAGE2, STEPS, TP2_PP2, Site

SWITCH = {"node1": "leaf1", "node3": "leaf1", "node2": "leaf2", "node4": "leaf2"}

pytestmark = pytest.mark.timeout(1200)


def test_ranks_are_numbered_along_the_switches(site: Site, straight: Path) -> None:
    logs = site.rank_logs(str(straight))
    assert sorted(logs) == list(range(8))
    order = ["node1", "node3", "node2", "node4"]  # leaf1, then leaf2
    for rank, log in logs.items():
        tp, pp, dp = ParallelConfig(tp=2, pp=2).place(rank)
        node = order[rank // 2]
        assert log.splitlines()[0] == f"rank={rank} tp={tp} pp={pp} dp={dp} node={node} switch={SWITCH[node]}"
    assert f"step {STEPS}/{STEPS} loss" in logs[0]


def test_teachers_ran_on_every_node(site: Site, straight: Path) -> None:
    workers = (straight / "logs" / "ray-workers.log").read_text()
    assert workers.count("Ray runtime started") == 3
    assert "Ray runtime started" in (straight / "logs" / "ray-head.log").read_text()
    assert not list((straight / "logs").glob(".ray-token*"))


def test_stage_2_follows(site: Site, straight: Path) -> None:
    out = "runs/stage2"
    site.finish(site.submit((), (*STAGE2, *TP2_PP2, "--init", str(straight), "--out", out)))
    assert [line["step"] for line in read_metrics(site.directory / out / "metrics.jsonl")] == list(range(1, STEPS + 1))
