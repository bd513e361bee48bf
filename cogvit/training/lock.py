"""One directory, one run: a lock that names its owner and cannot outlive it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cogvit.errors import ConfigError

LOCK = "lock.json"
_WAIT_S = 10.0  # for the owner of the last start, which may be about to end
_log = logging.getLogger(__name__)


@contextmanager
def run_lock(directory: Path, wait_s: float = _WAIT_S, *, flag: str = "--out") -> Iterator[None]:
    """Hold the lock of the directory that a flag names for the length of the block.

    The kernel (or the file server) frees it when its owner is killed or its machine goes down, so no clock or
    heartbeat decides who is alive. An owner's name that is left in a free lock is of one that did not end by itself.

    Errors: ConfigError names the owner when the run is running already.
    """
    with (directory / LOCK).open("a+") as file:
        _take(file, directory, wait_s, flag)
        file.seek(0)
        left = file.read()
        if left:
            _log.warning("%s: the start before this one, %s, did not end by itself", directory, _name(left))
        _write(file, json.dumps(_myself()))
        try:
            yield
        finally:
            _write(file, "")


def check_free(directory: Path, wait_s: float = _WAIT_S) -> None:
    """Look whether a run directory, which need not exist, could be locked now.

    Errors: ConfigError names the owner when the run is running already.
    """
    try:
        file = (directory / LOCK).open("r+")
    except OSError:
        return  # there is none; whether one can be made is seen when it is taken
    with file:
        _take(file, directory, wait_s)


def _take(file: IO[str], directory: Path, wait_s: float, flag: str = "--out") -> None:
    end_s = time.monotonic() + wait_s
    while True:
        try:
            # POSIX's, not flock's: it holds across the machines that mount a file system.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end_s:
                file.seek(0)
                owner = _name(file.read())
                raise ConfigError(f"{flag} {directory} is in use by {owner}; end it or choose another {flag}") from None
            time.sleep(0.2)
        except OSError as error:
            _log.warning("%s has no locks (%s): nothing keeps two runs apart there", directory, error.strerror)
            return


def _write(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _myself() -> dict[str, str]:
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _name(text: str) -> str:
    try:
        owner = json.loads(text)
        job = f" of job {owner['job']}" if owner["job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said its name"
