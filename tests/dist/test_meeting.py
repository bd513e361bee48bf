"""The process that keeps the store of many ranks: it lives as long as the first rank, and the first rank as it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogvit.config import ParallelConfig
from cogvit.errors import ConfigError
from cogvit.parallel.descriptors import descriptors
from cogvit.parallel.meeting import StoreKeeper
from cogvit.parallel.mesh import start_mesh, stop_mesh
from cogvit.training.together import Together
from tests.pool import Pool
from tests.processes import ended_in_time

TWO_KEEPERS = """
import sys, time
from cogvit.parallel.meeting import StoreKeeper
keepers = [StoreKeeper("127.0.0.1", int(port), 60.0) for port in sys.argv[1:]]
print(*(keeper.pid for keeper in keepers), flush=True)
time.sleep(60)
"""


def free_ports(number: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def sockets(pid: int | str = "self") -> int:
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return sum(link.startswith("socket") for link in links)


def meet(rank: int, world: int, port: int) -> tuple[float, int, int]:
    """Meet as more ranks than the first one serves: a sum over all, sockets of this rank and of the store's keeper."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pytest.MonkeyPatch().setattr("cogvit.parallel.descriptors._KEPT_BY_FIRST", 1)
    before = sockets()
    mesh = start_mesh(ParallelConfig())
    together = Together(rank, world)
    total = mesh.all_reduce(torch.tensor([float(rank + 1)])).item()
    mine, keepers = sockets() - before, 0
    if mesh.keeper is not None:
        keepers = sockets(mesh.keeper.pid)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # as Slurm sends them to all
            os.kill(mesh.keeper.pid, number)
    together.run(lambda: None, lambda answers: None)
    dist.barrier()
    together.close()
    stop_mesh(mesh)
    assert (mesh.keeper is not None) == (rank == 0)
    assert mesh.keeper is None or ended_in_time(mesh.keeper.pid)
    return total, mine, keepers


def test_no_rank_has_the_connections_of_the_others_to_the_store(pool: Pool) -> None:
    answers = pool.run(meet, 3, (free_ports(1)[0],))
    assert [total for total, _, _ in answers] == [6.0] * 3
    assert len({mine for _, mine, _ in answers}) == 1
    # Two of each rank, one of the process that keeps it, and those that listen.
    assert 2 * 3 + 1 < answers[0][2] <= 2 * 3 + 4


def test_a_rank_of_thousands_has_at_most_300_open_files() -> None:
    for world in (2, 16, 17, 512, 4096, 1 << 17):
        need = descriptors(ParallelConfig(tp=2), world, gloo=False)
        assert need.rank <= need.first <= 300 and need.keeper >= 2 * world


def test_the_first_rank_and_the_keeper_of_its_store_end_together() -> None:
    ports = [str(port) for port in free_ports(2)]
    command = [sys.executable, "-c", TWO_KEEPERS, *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        one, other = map(int, process.stdout.readline().split())
        os.kill(one, signal.SIGKILL)
        told = process.stderr.read()
        assert process.wait(20) == 1
    assert f"the process {one} that kept the ranks' store ended with status -9" in told and len(told.splitlines()) == 1
    assert ended_in_time(other)  # nobody closed it: its starter was gone at once, as when it is killed


def test_a_port_that_is_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} is in use by another program; set MASTER_PORT"):
            StoreKeeper("127.0.0.1", port, 60.0)
