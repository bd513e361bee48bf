"""A rank's number and place, from the launcher's variables or Slurm's."""

from __future__ import annotations

import os

import pytest

from cogvit.config import ParallelConfig, RunConfig
from cogvit.errors import ConfigError
from cogvit.slurm import join_slurm, place_line

STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of its own for the test."""
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_rank_of_a_slurm_step(environ: dict[str, str]) -> None:
    environ |= STEP | MEETING
    join_slurm()
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("5", "8", "1")


def test_a_launcher_inside_the_step_decides(environ: dict[str, str]) -> None:
    environ |= STEP | MEETING | {"RANK": "1", "WORLD_SIZE": "2"}
    join_slurm()
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize(
    "given", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_alone_outside_of_a_step_of_several(environ: dict[str, str], given: dict[str, str]) -> None:
    environ |= given
    join_slurm()
    assert "RANK" not in environ


def test_a_bare_srun_says_what_it_lacks(environ: dict[str, str]) -> None:
    environ |= STEP
    with pytest.raises(ConfigError, match=r"launch/stage1\.sh"):
        join_slurm()


def test_place_line(environ: dict[str, str]) -> None:
    config = RunConfig(parallel=ParallelConfig(tp=2, pp=2))
    environ |= {"SLURMD_NODENAME": "node4", "SLURM_TOPOLOGY_ADDR": "spine.leaf2.node4"}
    assert place_line(config, 7) == "rank=7 tp=1 pp=1 dp=1 node=node4 switch=leaf2"
    environ["SLURM_TOPOLOGY_ADDR"] = "node4"
    assert place_line(config, 4) == "rank=4 tp=0 pp=0 dp=1 node=node4 switch=?"
