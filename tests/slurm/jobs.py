"""Submitting the launch scripts to the lab as a user does, and reading what they left."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvit.training.checkpoint import folder_of, latest, read_state, weights
from cogvit.training.meter import read_metrics
from tests.e2e.corpus import write_world
from tests.slurm.lab import Job, Lab, wait_for

ROOT = Path(__file__).parents[2]
STEPS = 6
SMALL = (
    "--data.global-batch-images", "16", "--data.tokens-per-pack", "256", "--data.images-per-pack", "12",
    "--eval.every-steps", "0", "--log.wandb", "off", "--schedule.steps", str(STEPS), "--checkpoint.every-steps", "2",
    "--data.shards", "shards",
)  # fmt: skip
TEACHERS = (
    "--teachers.members.siglip2.path", "teachers/siglip2", "--teachers.members.dinov3.path", "teachers/dinov3",
    "--teachers.actors-per-teacher", "2",
)  # fmt: skip
STAGE1 = ("launch/stage1.sh", "demo_stage1", *SMALL, *TEACHERS)
STAGE2 = ("launch/stage2.sh", "demo_stage2", *SMALL)
STAGE2_ADAMW = (*STAGE2, "--optim.name", "adamw")
TP2_PP2 = ("--parallel.tp", "2", "--parallel.pp", "2")
SETTINGS = {
    "PYTHON": sys.executable, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1", "RAY_STORE_BYTES": "80000000",
    "RAY_START_S": "400", "GLOO_SOCKET_IFNAME": "eth0",
}  # fmt: skip
SBATCH = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60")


@dataclass(frozen=True)
class Site:
    """A cluster with a directory that all its nodes see: the repository's folders, shards and teachers."""

    lab: Lab
    directory: Path

    def submit(self, options: tuple[str, ...], command: tuple[str, ...], env: dict[str, str] | None = None) -> int:
        """sbatch, with the settings of this machine in the environment."""
        return self.lab.submit(*SBATCH, *options, *command, cwd=self.directory, env=SETTINGS | (env or {}))

    def command(self, *words: str, env: dict[str, str] | None = None) -> str:
        """Run a command of the repository where the controller is, as `submit` does; returns what it prints."""
        return self.lab.run(*words, cwd=self.directory, env=SETTINGS | (env or {}))

    def output(self, job: int) -> str:
        """What a job printed, over all its starts."""
        return "".join(path.read_text() for path in self.directory.glob(f"*-{job}.out"))

    def finish(self, job: int, timeout_s: float = 900) -> Job:
        """Wait for a job's good end; what it printed is in the failure."""
        ended = self.lab.wait(job, timeout_s)
        assert (ended.state, ended.exit_code) == ("COMPLETED", 0), f"{ended}\n{self.output(job)[-4000:]}"
        return ended

    def wait_for_step(self, job: int, out: str, step: int, timeout_s: float = 600) -> None:
        """Wait until a run has recorded a step."""
        path = self.directory / out / "metrics.jsonl"

        def reached() -> bool:
            if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
                return True
            assert self.lab.job(job).state != "FAILED", self.output(job)
            return False

        wait_for(reached, timeout_s, f"step {step} of {out}", pause_s=0.25)

    def nodes_of(self, job: int) -> list[str]:
        """The nodes of a running job in the order of its ranks."""
        names = self.lab.run("scontrol", "show", "hostnames", self.lab.job(job).nodes).split()
        return sorted(names, key=lambda name: (int(name[-1]) % 2 == 0, name))  # leaf1 has the odd ones

    def rank_logs(self, out: str) -> dict[int, str]:
        """The logs of a run by rank."""
        paths = sorted((self.directory / out / "logs").glob("rank_*.log"))
        return {int(re.findall(r"\d+", path.name)[0]): path.read_text() for path in paths}


def make_site(lab: Lab, directory: Path) -> Site:
    """Lay out the directory."""
    write_world(directory)
    for name in ("cogvit", "configs", "data_pipeline", "launch", "tools"):
        (directory / name).symlink_to(ROOT / name)
    return Site(lab, directory)


@contextmanager
def mounted(site: Site, node: str, source: Path, target: Path) -> Iterator[None]:
    """Put one directory or file in the place of another, on one node alone."""
    site.lab.on(node, "mount", "--bind", "-o", "ro", str(source), str(target))
    try:
        yield
    finally:
        site.lab.on(node, "umount", str(target))


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights."""
    path = latest(folder_of(out))
    assert path is not None, f"{out} has no checkpoint"
    return weights(path, "")


def assert_same_end(out: Path, other: Path) -> None:
    """Two runs ended with the same bits, step by step."""
    mine, theirs = final_weights(out), final_weights(other)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    curves = [[(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")] for run in (out, other)]
    assert curves[0] == curves[1]
    assert os.path.samefile(out, other) is False


def progress(out: Path) -> tuple[int, int]:
    """The last step a run recorded, and the step of its newest good checkpoint."""
    path = latest(folder_of(out))
    return int(read_metrics(out / "metrics.jsonl")[-1]["step"]), 0 if path is None else read_state(path).step
