"""Checks one GPU in ten minutes: numbers, kernels, speed, memory, both stages, and other programs beside.

usage: python -m tools.gpu_check --out DIR [flags]
--out DIR           where gpu_check.json and gpu_check.txt go, written anew after every section
--device KIND       cuda, or cpu: the same sections small (default: auto, a GPU where there is one)
--sections NAME,... some of the sections below; by default all, in this order
--limit-s N         a section that takes longer is given up (default: 240)

machine, ceilings   device, driver, packages; products and copies a second
attention           packed attention against softmax in fp64, with gradients; its speed
gradients           every gradient of the trunk in bf16 against fp32
steps               cogvit_l on 8,192 and 16,384 tokens: ms, share of the peak, memory, waits, with each recompute
kernels             what the profiler sees of one forward and backward
optimizer           Newton-Schulz
stages              20 steps of each stage from shards and a store that it makes, stopped and resumed
deterministic       stage 2 twice with --deterministic: the same bits, and at which cost
peers               timm's NaFlexVit and transformers' Siglip2 of the same size, where they are installed
gpu_tests           the quick ones of tests/gpu

Needs torch, numpy and what `cogvit.train` imports; no Ray, and a checkout need not be installed: PYTHONPATH=CHECKOUT is
enough. A section that fails is recorded with its error, and the next one goes on, in a fresh process where the GPU was
lost. Exit status: 0, or 1 where a section failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogvit import checkout  # noqa: F401  before what lies beside cogvit
from cogvit.config.arguments import run_command
from cogvit.config.device import device_fault, device_flag, local_device
from cogvit.config.environment import Process
from cogvit.errors import ConfigError
from tools.gpu_check.results import NAME, Section, read, write

SECTIONS = {
    "machine": "machine", "ceilings": "machine", "attention": "correct", "gradients": "correct", "steps": "steps",
    "kernels": "correct", "optimizer": "steps", "stages": "runs", "deterministic": "runs", "peers": "peers",
    "gpu_tests": "correct",
}  # fmt: skip
_FRESH = ("deterministic",)  # begins a process: torch asks once, at the first product, how cuBLAS was set
_LOST = 3  # exit status of a worker whose GPU no later section could use
_WORKER = "COGVIT_GPU_CHECK_WORKER"  # set in the process that runs sections


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = ""
    device: str = "auto"
    sections: str = ",".join(SECTIONS)
    limit_s: str = "240"


def check(arguments: Arguments) -> int:
    """Run every section, in a worker that is started anew where it dies; returns the exit status."""
    names, limit_s = _asked(arguments)
    out = Path(arguments.out)
    if os.environ.get(_WORKER):
        return work(arguments, names)
    if (out / f"{NAME}.json").exists():
        raise ConfigError(f"--out {out} holds a check already; pass another directory")
    if fault := device_fault(device_flag(arguments.device)):
        raise ConfigError(fault)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); pass another directory") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not to leave the worker behind
    while len(done := read(out)) < len(names):
        command = [sys.executable, "-m", "tools.gpu_check", "--out", str(out), "--device", arguments.device]
        watched([*command, "--sections", ",".join(names)], out, limit_s)
        now = read(out)
        if len(now) == len(done):  # it died in the middle of a section, or took too long
            reason = f"failed: the process died or took more than {limit_s:g} s; see worker.txt"
            write(out, _command(arguments), [*now, Section(names[len(now)], reason, limit_s, {})])
    failed = [section.name for section in read(out) if section.status != "ok"]
    print(f"{out / NAME}.txt: {len(names) - len(failed)} of {len(names)} sections ended well", flush=True)
    return 1 if failed else 0


def work(arguments: Arguments, names: list[str]) -> int:
    """Run the sections that are not done yet, in this process, and write the results after each."""
    from tools.gpu_check.work import Setting

    out = Path(arguments.out)
    setting = Setting(local_device(device_flag(arguments.device), Process()), out)
    sections = read(out)
    for place, name in enumerate(names[len(sections) :]):
        if name in _FRESH and place and not setting.small:
            return 0
        start_s = time.monotonic()
        try:
            sections.append(Section(name, "ok", 0.0, _function(name)(setting)))
        except Exception as error:  # whatever it is, it is what the check is for
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            sections.append(Section(name, f"failed: {reason}", 0.0, {}, traceback.format_exc()))
        spent = sections[-1]
        sections[-1] = Section(name, spent.status, time.monotonic() - start_s, spent.figures, spent.trace)
        write(out, _command(arguments), sections)
        print(f"{name:<14} {sections[-1].seconds:7.1f} s  {spent.status}", flush=True)
        if "CUDA error" in spent.trace:
            return _LOST
    return 0


def _function(name: str) -> Callable[..., dict[str, object]]:
    from importlib import import_module

    function: Callable[..., dict[str, object]] = getattr(import_module(f"tools.gpu_check.{SECTIONS[name]}"), name)
    return function


def watched(command: list[str], out: Path, limit_s: float) -> None:
    """Run a worker to its end, or end it and all that it started where one section is over its time."""
    with (out / "worker.txt").open("a") as log:
        worker = subprocess.Popen(command, env=os.environ | {_WORKER: "1"}, stderr=log, start_new_session=True)
        try:
            _wait(worker, out, limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # the tests that it runs hold the GPU too
            worker.wait()


def _wait(worker: subprocess.Popen[bytes], out: Path, limit_s: float) -> None:
    """Wait for the end of a worker, but no longer than a section may take."""
    begun_s, count = time.monotonic(), len(read(out))
    while worker.poll() is None and time.monotonic() - begun_s <= limit_s:
        time.sleep(0.2)
        if len(read(out)) != count:
            begun_s, count = time.monotonic(), len(read(out))


def _asked(arguments: Arguments) -> tuple[list[str], float]:
    if not arguments.out:
        raise ConfigError("--out DIR is needed: where the results go")
    names = arguments.sections.split(",")
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(f"--sections {name} is none of {', '.join(SECTIONS)}")
    if not arguments.limit_s.isdecimal() or int(arguments.limit_s) < 1:
        raise ConfigError(f"--limit-s {arguments.limit_s} must be a whole number of seconds")
    return names, float(arguments.limit_s)


def _command(arguments: Arguments) -> str:
    return f"python -m tools.gpu_check --out {arguments.out} --device {arguments.device}"


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, check))
