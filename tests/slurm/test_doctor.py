"""The preflight as a user runs it in an allocation."""

from __future__ import annotations

from tests.slurm.jobs import Site

SCRIPT = """#!/bin/bash
#SBATCH --job-name=doctor --output=%x-%j.out
export MASTER_ADDR=$(hostname) MASTER_PORT=29511
srun "$PYTHON" -m tools.doctor --out runs/doctor --disk-gb 0.001 --message-mb 2
"""


def test_doctor_under_srun(site: Site) -> None:
    (site.directory / "doctor.sh").write_text(SCRIPT)
    job = site.submit(("--nodes=2",), ("doctor.sh",))
    site.finish(job, timeout_s=120)
    printed = site.output(job)
    rows = [line.split() for line in printed.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"], printed
    assert len({row[1] for row in rows}) == 2  # two tasks on each node
    assert {row[-2] for row in rows} == {"yes"}  # a port of the next node, too, was reached
    assert "error" not in printed
