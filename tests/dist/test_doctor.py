"""The preflight: what it measures between ranks, what it calls fatal, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.pool import Pool
from tools import doctor
from tools.doctor import Arguments, Limits, Links, Node, diagnose, examine_links, examine_node, judge, table

LIMITS = Limits(Path("/runs"), "auto", disk_gb=10.0, message_mb=1.0, timeout_s=20.0)
WELL = Node(
    rank=0,
    host="n0",
    versions={"python": "3.11.9", **dict.fromkeys(doctor._PACKAGES, "1.0")},
    gpu="GPU X",
    gpu_id="",
    gpu_fault="",
    connections="",
    bf16=True,
    shm_gb=9.0,
    disk_gb=99.0,
    fault="",
    open_files=9999,
)
LINKED = Links(skew_s=0.01, reduce_gb_per_s=2.5)


def measure(rank: int, world: int, out: str) -> tuple[Node, Links]:
    return examine_node(Path(out), "auto"), examine_links(LIMITS)


def skewed(rank: int, world: int) -> Links:
    """The last rank's clock is ahead, its neighbor's address wrong."""
    if rank == world - 1:
        true_time, doctor.time.time = doctor.time.time, lambda: true_time() + 30.0
        doctor.socket.gethostname = lambda: "no-such-host.invalid"
    return examine_links(LIMITS)


def whole_examination(rank: int, world: int, outs: list[str]) -> int:
    return diagnose(Arguments(out=outs[rank], disk_gb="0.001", message_mb="1"))


def test_ranks_find_each_other(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(measure, 3, (str(tmp_path / "new" / "out"),))
    assert [node.rank for node, _ in found] == [0, 1, 2]
    for node, links in found:
        assert node.versions["torch"] and not node.fault and node.disk_gb > 0
        assert links.next_fault == "" and links.sums_right
        assert abs(links.skew_s) < 0.5 and links.reduce_gb_per_s is not None and links.reduce_gb_per_s > 0
    assert [links.reduce_gb_per_s for _, links in found] == [found[0][1].reduce_gb_per_s] * 3  # the slowest rank's
    assert judge([node for node, _ in found], [links for _, links in found], replace(LIMITS, disk_gb=0.001)) == []


def test_a_clock_and_an_address_that_are_off(pool: Pool) -> None:
    first, second, third = pool.run(skewed, 3)
    assert abs(first.skew_s) < 5 and abs(second.skew_s) < 5 and 25 < third.skew_s < 35
    assert "no-such-host.invalid" in second.next_fault
    assert first.next_fault == third.next_fault == ""


def test_every_rank_ends_alike(pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert pool.run(whole_examination, 2, ([str(tmp_path)] * 2,)) == [0, 0]
    assert pool.run(whole_examination, 2, ([str(tmp_path), str(tmp_path / "file" / "x")],)) == [2, 2]


CASES = [
    ({"versions": {name: v for name, v in WELL.versions.items() if name != "ray"}}, {}, True, "ray not installed"),
    ({"versions": {**WELL.versions, "torch": "2.0"}}, {}, True, "torch 2.0, not 1.0"),
    ({"versions": {**WELL.versions, "python": "3.12.1"}}, {}, True, "python 3.12.1, not 3.11.9"),
    ({"fault": "Permission denied"}, {}, True, "--out /runs cannot be written: Permission denied"),
    ({"disk_gb": 3.0}, {}, True, "3.0 GB free at --out /runs; --disk-gb 10 are needed"),
    ({}, {"next_fault": "n1:5: refused"}, True, "cannot connect to the next rank: n1:5: refused"),
    ({}, {"sums_right": False}, True, "a sum over all ranks came out wrong"),
    ({"gpu": ""}, {}, True, "not of one kind of GPU: GPU X, none"),
    ({"gpu": "GPU Y"}, {}, False, "not of one kind of GPU: GPU X, GPU Y"),
    ({"shm_gb": 0.06}, {}, False, "0.06 GB free in /dev/shm"),
    ({}, {"skew_s": -7.0}, False, "its clock is -7.0 s off"),
    ({"open_files": 200}, {}, True, "ulimit -Hn 200 is too low; it needs"),
    ({"bf16": False}, {}, False, "GPU X has no bf16"),
    ({"gpu_fault": "Slurm gave GPUs, torch sees none"}, {}, True, "Slurm gave GPUs, torch sees none"),
    ({"connections": "CUDA_DEVICE_MAX_CONNECTIONS=8"}, {}, False, "CUDA_DEVICE_MAX_CONNECTIONS=8"),
]


@pytest.mark.parametrize(("node", "link", "fatal", "text"), CASES, ids=[case[-1] for case in CASES])
def test_each_finding(node: dict[str, object], link: dict[str, object], fatal: bool, text: str) -> None:
    nodes = [WELL, replace(WELL, rank=1, host="n1"), replace(WELL, rank=2, host="n2", **node)]
    (finding,) = judge(nodes, [LINKED, LINKED, replace(LINKED, **link)], LIMITS)
    assert finding.fatal == fatal and text in finding.text
    assert finding.where in ("rank 2 on n2", "all ranks")
    assert "n2" in table(nodes, [LINKED] * 3).splitlines()[3]


def test_two_ranks_on_one_gpu() -> None:
    nodes = [replace(WELL, rank=rank, gpu_id=gpu) for rank, gpu in enumerate(["a", "b", "a"])]
    (finding,) = judge(nodes, [LINKED] * 3, LIMITS)
    assert finding.fatal and finding.where == "rank 2 on n0" and "shares its GPU (a) with rank 0" in finding.text


def test_fatal_findings_come_first() -> None:
    found = judge([replace(WELL, shm_gb=0.1, fault="no")], [Links()], LIMITS)
    assert [finding.fatal for finding in found] == [True, False]


def run_doctor(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "tools.doctor", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environ)


def test_alone(tmp_path: Path) -> None:
    done = run_doctor("--out", str(tmp_path), "--disk-gb", "0.001")
    assert done.returncode == 0, done.stderr
    head, row, *rest = done.stdout.splitlines()
    assert head.split()[:3] == ["rank", "host", "GPU"] and row.split()[:2] == ["0", socket.gethostname()]
    assert not any(line.startswith("error") for line in rest)


def test_promised_gpus_that_are_not_there_are_exit_2(tmp_path: Path) -> None:
    flags = ("--out", str(tmp_path), "--disk-gb", "0.001")
    done = run_doctor(*flags, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "Slurm gave GPUs (SLURM_GPUS_ON_NODE=4), and torch " in done.stdout
    assert run_doctor(*flags, "--device", "cpu", SLURM_GPUS_ON_NODE="4").returncode == 0


def test_no_room_is_exit_2(tmp_path: Path) -> None:
    done = run_doctor("--out", str(tmp_path), "--disk-gb", "1e9")
    assert done.returncode == 2 and "error: rank 0 on" in done.stdout


def test_ranks_that_never_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = run_doctor("--timeout-s", "2", **world)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert f"rank 1 of 2 met nobody at 127.0.0.1:{port} in 2 s" in line


@pytest.mark.parametrize("value", ["x", "0", "nan"])
def test_limits_are_numbers(value: str) -> None:
    assert not dist.is_initialized()
    with pytest.raises(doctor.ConfigError, match=f"--disk-gb {value}: must be a positive number"):
        diagnose(Arguments(disk_gb=value))
