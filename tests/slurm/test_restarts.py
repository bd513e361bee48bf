"""What the batch script makes of the ways in which ranks end: another start, of which nodes, and when it gives up."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest

from cogvit.training.manifest import MANIFEST
from tests.slurm.jobs import STAGE2, Site
from tests.slurm.lab import wait_for

pytestmark = pytest.mark.timeout(900)
ONE_RANK = ("--nodes=1", "--ntasks-per-node=1")


@pytest.fixture
def ending(tmp_path: Path) -> dict[str, str]:
    """The environment's Python, where a rank that is to train runs the commands in END, and a check those in CHECK."""
    wrapper = tmp_path / "python"
    wrapper.write_text(
        "#!/bin/bash\nSTART=$((${SLURM_RESTART_COUNT:-0} + 1))\n"
        'if [[ $1 == -c ]]; then eval "${CHECK:-}"; fi\n'
        'if [[ $* =~ "-m cogvit.train "|"-m tools.precompute_features " && $* != *--dry-run* ]]; then eval "$END"; fi\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    wrapper.chmod(0o755)
    (tmp_path / "ray").symlink_to(Path(sys.executable).with_name("ray"))
    return {"PYTHON": str(wrapper), "MAX_RESTARTS": "1"}


def test_the_budget_is_renewed_by_progress_and_ends_without(site: Site, ending: dict[str, str]) -> None:
    """Starts 1 and 3 save something, 2 and 4 do not; the first was asked to stop, the others leave as mistakes do."""
    out = site.directory / "runs" / "budget"
    note, saved = out / "logs" / "newest_checkpoint", out / "checkpoints" / "step_00000001"
    end = f"mkdir -p {saved}; touch {saved}/{MANIFEST}"  # or a start would refuse: what was saved is gone
    end += f"; case $START in 1) echo a >{note}; exit 75 ;; 3) echo b >{note} ;; esac; exit 2"
    job = site.submit(ONE_RANK, (*STAGE2, "--out", "runs/budget"), ending | {"END": end})
    ended, printed = site.lab.wait(job, 300), site.output(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 3), printed
    assert "requeued: stopped on request at a\n" in printed
    assert printed.count("restart 1 of 1 without a new checkpoint") == 2  # after a, and after b
    assert "ended with status 2, 2 times since b; not started again" in printed


def test_each_task_of_an_array_restarts_alone(site: Site, ending: dict[str, str]) -> None:
    """To the controller the last task's number is that of all: both wait for each other, then fail once."""
    here = site.directory / "runs" / "array-restarts"
    here.mkdir(parents=True)
    end = f'if ((START > 1)); then echo "$*"; exit 0; fi; echo >{here}/up$SLURM_ARRAY_TASK_ID'
    end += f"; until [[ -e {here}/up0 && -e {here}/up1 ]]; do sleep 0.1; done; sleep 2; exit 7"
    flags = ("--seed", "{task}", "--out", "runs/array-restarts/{task}")
    job = site.submit(("--array=0-1", *ONE_RANK), (*STAGE2, *flags), ending | {"END": end})
    for task in ("0", "1"):
        ended = site.lab.wait(f"{job}_{task}", 300)
        assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended
        assert f"--seed {task} --out runs/array-restarts/{task}" in site.rank_logs(f"runs/array-restarts/{task}")[0]


def test_a_node_that_keeps_failing_stays_where_no_other_is_left(site: Site, ending: dict[str, str]) -> None:
    """One of the four is drained, so that it does not count."""
    end = "if [[ $SLURMD_NODENAME == node3 ]] && ((START < 3)); then exit 7; fi; sleep 2; exit 0"
    flags = (*STAGE2, "--out", "runs/all-nodes")
    three = ("--nodes=3", "--ntasks-per-node=1")
    site.lab.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        job = site.submit(three, flags, ending | {"MAX_RESTARTS": "2", "END": end})
        ended = site.lab.wait(job, 300)
    finally:
        site.lab.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert (ended.state, ended.restarts, ended.excluded) == ("COMPLETED", 2, "(null)"), site.output(job)
    assert "node3 cannot be excluded: the job needs 3 nodes, and 2 would be left" in site.output(job)


def test_excluding_a_node_keeps_those_that_the_user_excluded(site: Site, ending: dict[str, str]) -> None:
    end = "if [[ $SLURMD_NODENAME == node4 ]]; then exit 7; fi; sleep 2; exit 0"
    flags = (*STAGE2, "--out", "runs/excluded-too")
    options = ("--nodes=2", "--ntasks-per-node=1", "--exclude=node1")
    job = site.submit(options, flags, ending | {"MAX_RESTARTS": "9", "NODE_FAILURES": "1", "END": end})
    ended = site.lab.wait(job, 300)
    assert (ended.state, ended.restarts, ended.excluded) == ("COMPLETED", 1, "node1,node4"), site.output(job)


def test_the_first_rank_that_failed_is_shown(site: Site, ending: dict[str, str]) -> None:
    end = "if ((SLURM_PROCID == 1)); then echo the reason; exit 2; fi; echo nothing; sleep 60"
    job = site.submit(("--nodes=1",), (*STAGE2, "--parallel.tp", "2", "--out", "runs/reason"), ending | {"END": end})
    assert site.lab.wait(job, 120).exit_code == 2
    assert "rank 1: the reason" in site.output(job) and "nothing" not in site.output(job)


def test_a_node_that_breaks_between_two_starts_is_left_out(site: Site, ending: dict[str, str]) -> None:
    """It fails the check before the ranks. At the first start that would be the user's to mend, and the job's end."""
    env = ending | {"MAX_RESTARTS": "3", "END": "if ((START == 1)); then exit 75; fi; exit 0"}
    env["CHECK"] = "if ((START > 1)) && [[ $SLURMD_NODENAME == node3 ]]; then exit 1; fi"
    job = site.submit(("--nodes=2", "--ntasks-per-node=1"), (*STAGE2, "--out", "runs/broken-later"), env)
    ended = site.lab.wait(job, 300)
    assert (ended.state, ended.restarts, ended.excluded) == ("COMPLETED", 3, "node3"), site.output(job)
    assert site.output(job).count("error: node3: PYTHON=") == 2


def test_what_another_job_saves_is_not_progress_of_one_that_it_refuses(site: Site, ending: dict[str, str]) -> None:
    out = site.directory / "runs" / "taken"
    end = f'echo \'{{"job": "99999"}}\' >{out}/lock.json; echo a >{out}/logs/newest_checkpoint; exit 2'
    job = site.submit(ONE_RANK, (*STAGE2, "--out", "runs/taken"), ending | {"END": end})
    ended = site.lab.wait(job, 120)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), site.output(job)
    assert "runs/taken is in use by job 99999" in site.output(job)


def test_ranks_that_save_until_the_time_limit_itself_begin_again(site: Site, ending: dict[str, str]) -> None:
    """Slurm then counts the job as ended, and not as one that waits for its next start. No signal comes before it."""
    end = "if ((START > 1)); then exit 0; fi; trap '' USR1; trap 'sleep 3; exit 75' TERM; while :; do sleep 0.5; done"
    options = (*ONE_RANK, "--time=1", "--signal=B:CONT@1")
    job = site.submit(options, (*STAGE2, "--out", "runs/late"), ending | {"END": end})
    ended = site.lab.wait(job, 400)
    assert "CANCELLED AT" in site.output(job) and "DUE TO TIME LIMIT" in site.output(job), site.output(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), site.output(job)


@pytest.mark.long
def test_a_controller_that_does_not_answer_is_asked_again(site: Site, ending: dict[str, str]) -> None:
    """It hangs from before the end of the rank until it has failed to say whether the job is in the queue already."""
    here = site.directory / "runs" / "no-answer"
    here.mkdir(parents=True)
    end = f"if ((START > 1)); then exit 0; fi; echo >{here}/up; until [[ -e {here}/go ]]; do sleep 0.1; done; exit 7"
    job = site.submit(ONE_RANK, (*STAGE2, "--out", "runs/no-answer"), ending | {"END": end})
    wait_for((here / "up").exists, 400, "the rank")
    controller = site.lab.daemons["controller"]
    controller.send_signal(signal.SIGSTOP)
    try:
        (here / "go").touch()
        wait_for(lambda: "slurm_load_jobs error" in site.output(job), 240, "a failed question")
    finally:
        controller.send_signal(signal.SIGCONT)
    ended = site.lab.wait(job, 300)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), site.output(job)


@pytest.mark.long
def test_stored_shards_renew_the_budget_of_precompute(site: Site, ending: dict[str, str]) -> None:
    out = site.directory / "runs" / "store-budget"
    end = f"if ((START == 3)); then exit 0; fi; echo >{out}/$START.safetensors; exit 1"
    command = ("launch/precompute.sh", "demo_stage1", "--out", "runs/store-budget")
    assert site.finish(site.submit(ONE_RANK, command, ending | {"END": end})).restarts == 2
