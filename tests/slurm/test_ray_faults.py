"""Stage 1 over four nodes with Ray teachers loses parts of its Ray cluster or of itself: one in CI, the others long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.jobs import STAGE1, TP2_PP2, Site, assert_same_end
from tests.slurm.lab import wait_for

pytestmark = pytest.mark.timeout(3600)
RAYLET = r"raylet/raylet "
GCS = r"gcs/gcs_server "


@pytest.mark.parametrize(
    ("name", "place", "process"),
    [
        ("worker-beside-no-leader", 1, RAYLET),
        pytest.param("worker-beside-a-leader", 2, RAYLET, marks=pytest.mark.long),
        pytest.param("head", 0, GCS, marks=pytest.mark.long),
    ],
)
def test_ray_is_struck(site: Site, straight: Path, name: str, place: int, process: str) -> None:
    """place: of the node in the order of the ranks; the ranks that ask teachers are on the first and the third."""
    out = f"runs/{name}"
    job = site.submit((), (*STAGE1, *TP2_PP2, "--out", out))
    site.wait_for_step(job, out, 3)
    (token,) = (site.directory / out / "logs").glob(".ray-token*")  # without it nobody joins the cluster
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    site.lab.on(site.nodes_of(job)[place], "pkill", "-KILL", "--full", process)
    site.finish(job, 1800)
    assert_same_end(site.directory / out, straight)


@pytest.mark.long
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
