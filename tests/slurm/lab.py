"""A real Slurm cluster on one machine: munge, a controller and nodes, each node in namespaces of its own.

A node has its own address, host name, process ids and /dev/shm, so that killing its first process is what a power cut
is to a machine. Nothing is left behind: the namespaces have no names and every daemon dies with this process.
Needs root and Debian's slurmctld, slurmd, slurm-client, munge, iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare", "setpriv")
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
CONTROLLER_IP = "10.77.0.254"

# Preemption leaves a job 60 s to save. RequeueExit is unset, as on most clusters.
SLURM_CONF = """
ClusterName=lab
SlurmctldHost=controller({controller_ip})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={root}/controller
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
MpiDefault=none
TopologyPlugin=topology/tree
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
JobRequeue=1
UnkillableStepTimeout=60
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str | None:
    """Say why this machine cannot run the lab, or None."""
    if os.geteuid() != 0:
        return "the Slurm lab makes namespaces and needs root"
    absent = [name for name in NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"the Slurm lab needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"namespaces are not allowed here: {probe.stderr.decode().strip()}"


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job."""

    number: int | str
    state: str
    exit_code: int
    restarts: int
    nodes: str
    excluded: str


@dataclass
class Lab:
    """The cluster; it runs while the context is open. Two leaf switches under one spine, half of the nodes on each."""

    root: Path
    num_nodes: int = 4
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    links: int = 0  # network links made so far: their names are never used twice

    @property
    def nodes(self) -> list[str]:
        """node1, node2, ..."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    def __enter__(self) -> Self:
        for name in ("etc", "run", "log", "controller", "spool"):
            (self.root / name).mkdir(parents=True)
        self._write_configuration()
        try:
            self._start("munged", ["munged", "--force", "--foreground", *self._munge_options()])
            wait_for(lambda: (self.root / "run" / "munge.socket").exists(), 20, "munged")
            self._start_controller()
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self.idle() == self.num_nodes, 60, "idle nodes")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self.daemons.values()):
            process.kill()
            process.wait()

    def run(
        self, *command: str, timeout_s: float = 60, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Run a client command where the controller is; returns what it prints."""
        return subprocess.run(
            [*self._enter("controller", "--net", "--mount", "--uts"), f"--wdns={cwd or self.root}", *command],
            env=self._environment() | (env or {}),
            timeout=timeout_s, check=True, text=True, capture_output=True,
        ).stdout  # fmt: skip

    def on(self, node: str, *command: str) -> str:
        """Run a command on a node; returns what it prints, whatever its exit status."""
        inside = self._enter(node, "--net", "--uts")
        # --pid=/proc/PID/ns/pid_for_children: the first process of the node is a child of the one we know.
        inside += [
            f"--pid=/proc/{self.daemons[node].pid}/ns/pid_for_children",
            f"--mount=/proc/{self._first(node)}/ns/mnt",
        ]
        return subprocess.run([*inside, *command], text=True, capture_output=True, timeout=60).stdout

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str]) -> int:
        """Run sbatch; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env))

    def job(self, number: int | str) -> Job:
        """Ask the controller for a job, or a task of an array by JOB_TASK."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        values = dict(re.findall(r"(\w+)=(\S*)", text))
        return Job(
            number,
            values["JobState"],
            int(values["ExitCode"].partition(":")[0]),
            int(values["Restarts"]),
            values["NodeList"],
            values["ExcNodeList"],
        )

    def wait(self, number: int | str, timeout_s: float) -> Job:
        """Wait for a job's end."""
        wait_for(lambda: self.job(number).state in ENDED, timeout_s, f"the end of job {number}", pause_s=1.0)
        return self.job(number)

    def idle(self) -> int:
        """Count the idle nodes."""
        try:
            return len(set(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()))
        except subprocess.CalledProcessError:  # the controller is not there yet
            return 0

    def start_node(self, node: str) -> None:
        """Start a node, also after `kill_node`."""
        etc = self.root / "etc"
        self._start(
            node,
            ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-euc",
             f"hostname {node}; {bind_names(etc)}; mount -t tmpfs shm /dev/shm; ip link set lo up\n"
             "until ip link show eth0 up 2>/dev/null | grep -q eth0; do sleep 0.05; done\n"
             # Not exec: the first process of a process namespace must reap orphans, and slurmd does not.
             f"slurmd -D -N {node} -f {etc}/slurm.conf & wait $!"],
        )  # fmt: skip
        self._connect(node, f"10.77.0.{self.nodes.index(node) + 1}")

    def kill_node(self, node: str) -> None:
        """End every process of a node at once."""
        process = self.daemons.pop(node)
        process.kill()
        process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                cwd=self.root, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _start_controller(self) -> None:
        etc = self.root / "etc"
        self._start(
            "controller",
            ["unshare", "--net", "--mount", "--uts", "bash", "-euc",
             f"hostname controller; {bind_names(etc)}; ip link set lo up; ip link add lab type bridge\n"
             f"ip address add {CONTROLLER_IP}/24 dev lab; ip link set lab up\n"
             f"exec slurmctld -D -f {etc}/slurm.conf"],
        )  # fmt: skip
        wait_for(self._answers, 30, "slurmctld")

    def _answers(self) -> bool:
        try:
            return "is UP" in self.run("scontrol", "ping", timeout_s=10)
        except subprocess.SubprocessError:
            return False

    def _connect(self, node: str, address: str) -> None:
        """Lay a cable from a node to the controller's bridge."""
        self.links += 1
        link, pid = f"port{self.links}", str(self.daemons[node].pid)
        wait_for(lambda: self._namespace(node) != self._namespace("munged"), 10, f"{node}'s network")
        self.run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self.run("ip", "link", "set", link, "master", "lab", "up")
        for words in (
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {CONTROLLER_IP}",
        ):
            subprocess.run([*self._enter(node, "--net"), "ip", *words.split()], check=True, env=self._environment())

    def _namespace(self, name: str) -> str:
        return os.readlink(f"/proc/{self.daemons[name].pid}/ns/net")

    def _first(self, node: str) -> int:
        """The host's id of a node's first process."""
        pid = self.daemons[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _enter(self, name: str, *kinds: str) -> list[str]:
        return ["nsenter", f"--target={self.daemons[name].pid}", *kinds]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": SYSTEM_PATH,
            "SLURM_CONF": str(self.root / "etc" / "slurm.conf"),
            "HOME": "/root",
            "LC_ALL": "C",
        }

    def _munge_options(self) -> list[str]:
        etc, run = self.root / "etc", self.root / "run"
        return [
            f"--key-file={etc}/munge.key", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={self.root}/log/munged.log", f"--seed-file={run}/munge.seed",
        ]  # fmt: skip

    def _write_configuration(self) -> None:
        etc, half = self.root / "etc", max(1, self.num_nodes // 2)
        (etc / "munge.key").touch(mode=0o600)
        (etc / "munge.key").write_bytes(os.urandom(128))
        addresses = {node: f"10.77.0.{number}" for number, node in enumerate(self.nodes, 1)}
        nodes = [f"NodeName={node} NodeAddr={address} CPUs=8 State=UNKNOWN" for node, address in addresses.items()]
        conf = SLURM_CONF.format(root=self.root, run=self.root / "run", controller_ip=CONTROLLER_IP)
        (etc / "slurm.conf").write_text(conf + "\n".join(nodes) + "\n")
        # Interleaved, so that the order of the names is not the order of the switches.
        leaves = [self.nodes[0::2], self.nodes[1::2]] if half < self.num_nodes else [self.nodes]
        switches = [f"SwitchName=leaf{n} Nodes={','.join(names)}" for n, names in enumerate(leaves, 1)]
        spine = f"SwitchName=spine Switches=leaf[1-{len(leaves)}]"
        (etc / "topology.conf").write_text("\n".join([*switches, spine]) + "\n")
        hosts = addresses | {"controller": CONTROLLER_IP, "localhost": "127.0.0.1"}
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        # There is no DNS in here: without these two every reverse look-up waits for seconds.
        (etc / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")


def bind_names(etc: Path) -> str:
    """The shell command that puts the lab's name files in the place of the machine's, in a mount namespace."""
    return "; ".join(
        f"mount --bind {etc}/{name} $(readlink -f /etc/{name})" for name in ("hosts", "nsswitch.conf", "resolv.conf")
    )


def wait_for(holds: Callable[[], bool], timeout_s: float, what: str, pause_s: float = 0.1) -> None:
    """Wait until something holds. Errors: TimeoutError names it."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(f"no {what} within {timeout_s:g} s")
        time.sleep(pause_s)
