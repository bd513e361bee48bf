"""A rank's number and place, from the launcher's variables or Slurm's."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvit.config import ParallelConfig, RunConfig
from cogvit.config.environment import speaks, this_process
from cogvit.errors import ConfigError
from cogvit.training.slurm import place_line

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
    this_process()
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("5", "8", "1")


def test_a_launcher_inside_the_step_decides(environ: dict[str, str]) -> None:
    environ |= STEP | MEETING | {"RANK": "1", "WORLD_SIZE": "2"}
    this_process()
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize(
    "given", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_alone_outside_of_a_step_of_several(environ: dict[str, str], given: dict[str, str]) -> None:
    environ |= given
    this_process()
    assert "RANK" not in environ


def test_a_bare_srun_says_what_it_lacks(environ: dict[str, str]) -> None:
    environ |= STEP
    with pytest.raises(ConfigError, match=r"launch/stage1\.sh"):
        this_process()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc' in the environment must be a whole number"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK='' in the environment"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK='-1'"),
        ({"RANK": "\u0663", "WORLD_SIZE": "4"}, "RANK='\u0663'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number of at least 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "not told where the ranks meet"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "not told where the ranks meet"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | MEETING | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        (STEP | MEETING | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=''"),
        (STEP | MEETING | {"SLURM_PROCID": ""}, "SLURM_PROCID=''"),
        (MEETING | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        (STEP | MEETING | {"RANK": "0", "WORLD_SIZE": "1"}, "Slurm step of 8 tasks"),
    ],
)
def test_what_a_launcher_cannot_mean_is_one_line(environ: dict[str, str], given: dict[str, str], reason: str) -> None:
    environ |= given
    with pytest.raises(ConfigError, match=re.escape(reason)):
        this_process().check_meeting()


@settings(max_examples=2000, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "RANK",
                "WORLD_SIZE",
                "LOCAL_RANK",
                "MASTER_ADDR",
                "MASTER_PORT",
                "SLURM_STEP_NUM_TASKS",
                "SLURM_PROCID",
                "SLURM_LOCALID",
            ]
        ),
        st.sampled_from(["0", "1", "2", "8", "", " 1", "-1", "1.0", "node1", "29500", "99999"]) | st.text(max_size=4),
    )
)
def test_any_environment_is_a_process_or_one_line(values: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", values)
        try:
            process = this_process()
            process.check_meeting()
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            assert 0 <= process.rank < process.world_size
            assert process.alone or process.world_size == 1 or values["MASTER_ADDR"]
        assert isinstance(speaks(), bool)


def test_place_line(environ: dict[str, str]) -> None:
    config = RunConfig(parallel=ParallelConfig(tp=2, pp=2))
    environ |= {"SLURMD_NODENAME": "node4", "SLURM_TOPOLOGY_ADDR": "spine.leaf2.node4"}
    assert place_line(config, 7, "cuda:3") == "rank=7 tp=1 pp=1 dp=1 device=cuda:3 node=node4 switch=leaf2"
    environ["SLURM_TOPOLOGY_ADDR"] = "node4"
    assert place_line(config, 4, "cpu") == "rank=4 tp=0 pp=0 dp=1 device=cpu node=node4 switch=?"
