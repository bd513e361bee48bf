"""The lab and a site on it, once per test run; skipped with the reason where the machine cannot have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import STAGE1, STAGE2_ADAMW, TP2_PP2, Site, make_site
from tests.slurm.lab import Lab, missing


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Four nodes under two switches."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("slurm") / "lab") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A directory that every node sees."""
    return make_site(lab, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def straight(site: Site) -> Path:
    """Stage 1 over 4 nodes x 2 tasks at tp=2, pp=2, dp=2 with Ray teachers on all nodes, undisturbed.

    What another launcher has left in the environment of sbatch changes nothing (examples#458).
    """
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "192.0.2.1"}
    site.finish(site.submit((), (*STAGE1, *TP2_PP2, "--out", "runs/straight"), left))
    return site.directory / "runs" / "straight"


@pytest.fixture(scope="session")
def straight2(site: Site, straight: Path) -> Path:
    """Stage 2 from the encoder of stage 1, on the same nodes in the same layout, undisturbed."""
    flags = (*TP2_PP2, "--init", str(straight), "--out", "runs/straight2")
    site.finish(site.submit((), (*STAGE2_ADAMW, *flags)))
    return site.directory / "runs" / "straight2"
