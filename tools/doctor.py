"""Examines every node before a run: software, memory, disk, clocks, ports and collectives.

usage: python -m tools.doctor [--out DIR] [--device KIND] [--disk-gb N] [--message-mb N] [--timeout-s N] [--tp T]
                              [--pp P]

One table with a row for each rank, then what is wrong. Run it as the run will be: alone, under torchrun, or in an
allocation with one task a GPU (MASTER_ADDR=$(hostname) MASTER_PORT=29500 srun python -m tools.doctor --out DIR).

--out DIR        where the run directory will be: it must be writable on every rank (default: the current directory)
--device KIND    auto, cuda or cpu, as the run will be told (default: auto)
--disk-gb N      free space that the run needs there (default: 10; one checkpoint of the 403M encoder takes about 5)
--message-mb N   size of the reduction whose bandwidth is measured (default: 64)
--timeout-s N    how long ranks may take to meet and to answer (default: 60)
--tp T --pp P    the run's layout, which decides how many open files its ranks need (default: 1)

Exit status: 0, also with warnings; 2 when something would break a run.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from cogvit.config import ParallelConfig
from cogvit.config.arguments import run_command
from cogvit.config.device import Device, device_fault, device_flag, local_device
from cogvit.config.environment import speaks, this_process
from cogvit.errors import ConfigError
from cogvit.parallel.descriptors import Descriptors, descriptors, most_descriptors, take_all_descriptors
from cogvit.parallel.meeting import join_world

_PACKAGES = ("torch", "megatron-core", "deepspeed", "ray", "transformers", "webdataset", "pyarrow", "safetensors")
_SHM = Path("/dev/shm")
_GB = 1e9
_LEAST_SHM_GB = 1.0
_MOST_SKEW_S = 1.0
_ROUNDS = 5  # of a measurement; its median counts


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = "."
    device: str = "auto"
    disk_gb: str = "10"
    message_mb: str = "64"
    timeout_s: str = "60"
    tp: str = "1"
    pp: str = "1"


@dataclass(frozen=True)
class Limits:
    """What the examination asks for."""

    out: Path
    device: Device
    disk_gb: float
    message_mb: float
    timeout_s: float
    layout: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class Node:
    """What one rank finds where it runs, without asking others."""

    rank: int
    host: str
    versions: dict[str, str]  # of Python and the installed packages
    gpu: str  # "" without one
    gpu_id: str  # of the device itself, whatever its number; "" without one
    gpu_fault: str  # why there is none where one was asked for or promised
    connections: str  # CUDA_DEVICE_MAX_CONNECTIONS where tensor parallelism asks for another, else ""
    bf16: bool
    shm_gb: float  # free
    disk_gb: float  # free where the run directory will be
    fault: str  # why that cannot be written; "" where it can
    open_files: int  # that a process may have, if it asks


@dataclass(frozen=True)
class Links:
    """What one rank finds together with the others; alone, all is well and nothing is measured."""

    skew_s: float = 0.0  # of its clock against rank 0's
    next_fault: str = ""  # why it cannot open a connection to the next rank
    sums_right: bool = True
    reduce_gb_per_s: float | None = None  # of the message, through the slowest rank


@dataclass(frozen=True)
class Finding:
    """Something that a user should know; fatal where a run would break."""

    fatal: bool
    where: str
    text: str


def examine_node(out: Path, asked: Device) -> Node:
    """Look at this rank's machine."""
    fault_of_device, cuda = device_fault(asked), _device().type == "cuda"
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    fault, free_gb = "", 0.0
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            free_gb = shutil.disk_usage(out).free / _GB
    except OSError as error:
        fault = error.strerror or str(error)
    return Node(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        versions=installed,
        gpu=torch.cuda.get_device_name() if cuda else "",
        gpu_id=str(torch.cuda.get_device_properties().uuid) if cuda else "",
        gpu_fault=fault_of_device,
        connections=_connections() if cuda else "",
        bf16=not cuda or torch.cuda.is_bf16_supported(),
        shm_gb=shutil.disk_usage(_SHM).free / _GB if _SHM.exists() else 0.0,
        disk_gb=free_gb,
        fault=fault,
        open_files=most_descriptors(),
    )


def examine_links(limits: Limits) -> Links:
    """Measure clocks, connections and collectives; every rank calls it."""
    if dist.get_world_size() == 1:
        return Links()
    return Links(_clock_skew_s(), _reach_next(limits.timeout_s), _sums_right(), _reduce_gb_per_s(limits.message_mb))


def judge(nodes: list[Node], links: list[Links], limits: Limits) -> list[Finding]:
    """Return what is wrong, what breaks a run first."""
    found: list[Finding] = []
    usual = dict(Counter(tuple(sorted(node.versions.items())) for node in nodes).most_common(1)[0][0])
    for node, link in zip(nodes, links, strict=True):
        where = f"rank {node.rank} on {node.host}"
        open_files = _open_files(len(nodes), limits)
        needed = max(open_files.first, open_files.keeper) if node.rank == 0 else open_files.rank
        absent = [package for package in _PACKAGES if package not in node.versions]
        other = [f"{name} {v}, not {usual[name]}" for name, v in node.versions.items() if usual.get(name, v) != v]
        short = f"{node.disk_gb:.1f} GB free at --out {limits.out}; --disk-gb {limits.disk_gb:g} are needed"
        unreached = f"cannot connect to the next rank: {link.next_fault}; is a firewall between?"
        checks = (
            (True, bool(node.gpu_fault), node.gpu_fault),
            (True, bool(absent), f"{', '.join(absent)} not installed"),
            (True, bool(other), f"other versions than most ranks have: {', '.join(other)}"),
            (True, bool(node.fault), f"--out {limits.out} cannot be written: {node.fault}"),
            (True, not node.fault and node.disk_gb < limits.disk_gb, short),
            (True, bool(link.next_fault), unreached),
            (True, not link.sums_right, "a sum over all ranks came out wrong"),
            (False, node.shm_gb < _LEAST_SHM_GB, f"{node.shm_gb:.2f} GB free in /dev/shm; NCCL and Ray want 1 or more"),
            (False, abs(link.skew_s) > _MOST_SKEW_S, f"its clock is {link.skew_s:+.1f} s off; logs will not agree"),
            (
                True,
                node.open_files < needed,
                f"ulimit -Hn {node.open_files} is too low; it needs {needed} open files (LimitNOFILE)",
            ),
            (False, not node.bf16, f"{node.gpu} has no bf16; use --precision fp32"),
            (False, bool(node.connections), node.connections),
        )
        found += [Finding(fatal, where, text) for fatal, wrong, text in checks if wrong]
    taken: dict[str, int] = {}
    for node in nodes:
        first = taken.setdefault(node.gpu_id, node.rank) if node.gpu_id else node.rank
        if first != node.rank:
            text = f"shares its GPU ({node.gpu_id}) with rank {first}; start one process a GPU"
            found.append(Finding(True, f"rank {node.rank} on {node.host}", text))
    gpus = {node.gpu for node in nodes}
    if len(gpus) > 1:
        named = ", ".join(sorted(gpu or "none" for gpu in gpus))
        found.append(Finding("" in gpus, "all ranks", f"not of one kind of GPU: {named}"))
    return sorted(found, key=lambda finding: not finding.fatal)


def _open_files(world_size: int, limits: Limits) -> Descriptors:
    return descriptors(limits.layout, world_size, gloo=not torch.cuda.is_available())


def pinned_differently(node: Node) -> list[str]:
    """Return "PACKAGE HERE, PINNED is tested" for each package of another version than this project pins."""
    try:
        required = metadata.requires("cogvit") or []
    except metadata.PackageNotFoundError:
        return []
    pins = dict(line.split(";")[0].strip().split("==") for line in required if "==" in line.split(";")[0])
    pins = {name.partition("[")[0].strip(): version.strip() for name, version in pins.items()}
    return [
        f"{package} {version}, {pins[package]} is tested"
        for package, version in node.versions.items()
        if package in pins and version.partition("+")[0] != pins[package]
    ]


def table(nodes: list[Node], links: list[Links]) -> str:
    """Return a row for each rank."""
    head = ("rank", "host", "GPU", "torch", "shm GB", "disk GB", "clock s", "next", "reduce GB/s")
    rows = [head]
    for node, link in zip(nodes, links, strict=True):
        rate = "-" if link.reduce_gb_per_s is None else f"{link.reduce_gb_per_s:.2f}"
        numbers = (f"{node.shm_gb:.1f}", f"{node.disk_gb:.0f}", f"{link.skew_s:+.3f}")
        reached = "-" if link.reduce_gb_per_s is None else "fails" if link.next_fault else "yes"
        rows.append(
            (str(node.rank), node.host, node.gpu or "-", node.versions.get("torch", "-"), *numbers, reached, rate)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def diagnose(arguments: Arguments) -> int:
    """Examine every rank and print the table on the first; returns the exit status, the same on every rank."""
    limits = _read_limits(arguments)
    with _in_world(limits):
        try:
            mine = examine_node(limits.out, limits.device), examine_links(limits)
            found: list[tuple[Node, Links]] = [mine] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        except RuntimeError as error:  # a peer died, or its network is silent
            raise ConfigError(f"the ranks stopped answering each other: {str(error).splitlines()[0]}") from None
    nodes, links = [node for node, _ in found], [link for _, link in found]
    findings = judge(nodes, links, limits)
    if mine[0].rank == 0:
        print(table(nodes, links))
        needed = _open_files(len(nodes), limits)
        keeper = f"{needed.keeper} for who keeps the ranks' store" + (" (the first)" * (needed.keeper == needed.first))
        print(f"open files: {needed.rank} for a rank of this layout, {keeper}; a run asks for them")
        for line in pinned_differently(nodes[0]):
            print(f"warning: {line}")
        for finding in findings:
            print(f"{'error' if finding.fatal else 'warning'}: {finding.where}: {finding.text}")
        if not findings:
            print(f"all well on {len(nodes)} ranks, {len({node.host for node in nodes})} hosts")
    return 2 if any(finding.fatal for finding in findings) else 0


def _read_limits(arguments: Arguments) -> Limits:
    values = []
    for name in ("disk_gb", "message_mb", "timeout_s"):
        text = getattr(arguments, name)
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {text}: must be a positive number")
        values.append(value)
    sizes = []
    for name in ("tp", "pp"):
        text = getattr(arguments, name)
        if not (text.isascii() and text.isdecimal() and int(text) > 0):
            raise ConfigError(f"--{name} {text}: must be a whole number of at least 1")
        sizes.append(int(text))
    disk_gb, message_mb, timeout_s = values
    device, layout = device_flag(arguments.device), ParallelConfig(tp=sizes[0], pp=sizes[1])
    return Limits(Path(arguments.out), device, disk_gb, message_mb, timeout_s, layout)


@contextmanager
def _in_world(limits: Limits) -> Iterator[None]:
    """Be in the world inside; alone where no launcher has given this process a rank."""
    if dist.is_initialized():
        yield
        return
    process = this_process()
    backend = "gloo"
    if not device_fault(limits.device) and local_device(limits.device, process).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    take_all_descriptors()  # what a run would lack is said of all ranks, so they must meet
    try:
        keeper = join_world(process, backend, limits.timeout_s)
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).splitlines()[0][:120]
        message = (
            f"rank {process.rank} of {process.world_size} met nobody at {place} in {limits.timeout_s:g} s"
            f" ({reason}); see MASTER_ADDR, MASTER_PORT and firewalls"
        )
        if not speaks():  # the first rank, which speaks for all, may be the one that is not there
            print(f"error: {message}", file=sys.stderr)
        raise ConfigError(message) from None
    try:
        yield
    finally:
        dist.destroy_process_group()
        if keeper is not None:
            keeper.close()


def _clock_skew_s() -> float:
    """This clock less rank 0's, read when all have left a barrier; the smallest of a few readings has least jitter."""
    readings = []
    for _ in range(_ROUNDS):
        dist.barrier()
        now_s = torch.tensor([time.time()], dtype=torch.float64)
        theirs = now_s.clone()
        dist.broadcast(theirs, src=0)
        readings.append(float(now_s - theirs))
    return min(readings, key=abs)


def _reach_next(timeout_s: float) -> str:
    """Open a connection to the next rank's machine on a port that the system chose; returns what went wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with socket.create_server(("", 0)) as server:
        addresses: list[tuple[str, int]] = [("", 0)] * world
        dist.all_gather_object(addresses, (socket.gethostname(), server.getsockname()[1]))
        fault = ""
        host, port = addresses[(rank + 1) % world]
        try:
            socket.create_connection((host, port), timeout=min(timeout_s, 10.0)).close()
        except OSError as error:
            fault = f"{host}:{port}: {error.strerror or error}"
        dist.barrier()  # nobody stops listening before all have tried
    return fault


def _sums_right() -> bool:
    world = dist.get_world_size()
    ranks = torch.full((1000,), float(dist.get_rank()), device=_device())
    dist.all_reduce(ranks)
    return bool((ranks == world * (world - 1) / 2).all())


def _reduce_gb_per_s(message_mb: float) -> float:
    message = torch.zeros(max(1, int(message_mb * 1e6) // 4), device=_device())
    seconds = []
    for _ in range(_ROUNDS + 1):  # the first makes the connections
        dist.barrier()
        start_s = time.perf_counter()
        dist.all_reduce(message)
        if message.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    slowest = torch.tensor([statistics.median(seconds[1:])], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return message.numel() * 4 / float(slowest) / _GB


def _connections() -> str:
    """Return what is wrong with the number of queues to the GPU where ranks are tensor-parallel, or ""."""
    number, major = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", ""), torch.cuda.get_device_capability()[0]
    wanted = number == "1" if major < 10 else number != "1"  # Blackwell needs no order of launches
    if dist.get_world_size() == 1 or wanted:
        return ""
    value = "1" if major < 10 else "32"
    return (
        f"CUDA_DEVICE_MAX_CONNECTIONS={number or 'unset'}: under --parallel.tp messages run beside products only with"
        f" {value} (launch/env.sh sets it there)"
    )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, diagnose))
