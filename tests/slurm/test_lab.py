"""The lab is a cluster: several machines, switches, crashes; and the launch scripts are clean shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_for

LAUNCH = Path(__file__).parents[2] / "launch"


def test_scripts_are_clean_shell() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    scripts = sorted(str(path.relative_to(LAUNCH.parent)) for path in LAUNCH.glob("*.sh"))
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_nodes_are_machines_of_their_own(lab: Lab) -> None:
    assert [lab.on(node, "hostname").strip() for node in lab.nodes] == lab.nodes
    addresses = {lab.on(node, "hostname", "-I").strip() for node in lab.nodes}
    assert len(addresses) == len(lab.nodes)
    assert "slurmctld" not in lab.on("node1", "ps", "-A", "-o", "comm")


def test_a_killed_node_takes_its_processes_along_and_comes_back(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsleep 1234 & echo $SLURM_RESTART_COUNT >> {tmp_path}/started; wait\n")
    job = lab.submit("--nodelist=node4", str(script), cwd=tmp_path, env={})
    wait_for(lambda: "sleep 1234" in lab.on("node4", "ps", "-A", "-o", "args"), 20, "the job on node4")
    lab.kill_node("node4")
    wait_for(lambda: lab.job(job).state == "PENDING", 60, "requeue after the crash")
    lab.start_node("node4")
    wait_for(lambda: (tmp_path / "started").read_text().split()[-1:] == ["1"], 60, "the second start")
    assert lab.on("node4", "ps", "-A", "-o", "args").count("sleep 1234") == 1
    lab.run("scancel", str(job))
    wait_for(lambda: lab.idle() == lab.num_nodes, 30, "idle nodes")
