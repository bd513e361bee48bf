"""Stage 1 over four nodes with Ray teachers loses parts of its Ray cluster and of itself; marked long."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvit.training.meter import read_metrics
from tests.slurm.jobs import STAGE1, STAGE2, TP2_PP2, Site, assert_same_end
from tests.slurm.lab import wait_for

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long]
RAYLET = r"raylet/raylet "
GCS = r"gcs/gcs_server "


@pytest.mark.parametrize(
    ("name", "place", "process"),
    [("worker-beside-no-leader", 1, RAYLET), ("worker-beside-a-leader", 2, RAYLET), ("head", 0, GCS)],
)
def test_ray_is_struck(site: Site, straight: Path, name: str, place: int, process: str) -> None:
    """place: of the node in the order of the ranks; the ranks that ask teachers are on the first and the third."""
    out = f"runs/{name}"
    job = site.submit((), (*STAGE1, *TP2_PP2, "--out", out))
    site.wait_for_step(job, out, 3)
    site.lab.on(site.nodes_of(job)[place], "pkill", "-KILL", "--full", process)
    site.finish(job, 1800)
    assert_same_end(site.directory / out, straight)


def test_a_node_of_the_ray_cluster_is_killed(site: Site, straight: Path) -> None:
    out = "runs/node"
    job = site.submit((), (*STAGE1, *TP2_PP2, "--out", out))
    site.wait_for_step(job, out, 3)
    node = site.nodes_of(job)[-1]
    site.lab.kill_node(node)
    wait_for(lambda: site.lab.job(job).restarts == 1, 240, "the requeue")
    site.lab.start_node(node)
    site.finish(job, 1800)
    assert_same_end(site.directory / out, straight)


def test_another_layout_takes_the_run_over_and_gives_it_back(site: Site) -> None:
    """Four nodes at tp=2, pp=2, dp=2; two at tp=1, pp=1, dp=4; four again: the losses are those of one layout."""
    stage2 = (*STAGE2, "--optim.name", "adamw")
    site.finish(site.submit((), (*stage2, *TP2_PP2, "--out", "runs/one-layout")))

    for nodes, layout, until in (("4", TP2_PP2, 2), ("2", (), 4), ("4", TP2_PP2, 6)):
        job = site.submit((f"--nodes={nodes}",), (*stage2, *layout, "--out", "runs/layouts"), {})
        if until < 6:
            site.wait_for_step(job, "runs/layouts", until)
            site.lab.run("scancel", "--batch", "--signal=USR1", str(job))
            wait_for(lambda job=job: "requeued:" in site.output(job), 240, "the save")
            site.lab.run("scancel", str(job))
        else:
            site.finish(job)
    rows, straight = (
        read_metrics(site.directory / "runs" / name / "metrics.jsonl") for name in ("layouts", "one-layout")
    )
    assert [row["step"] for row in rows] == [row["step"] for row in straight]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in straight], rel=1e-6)
