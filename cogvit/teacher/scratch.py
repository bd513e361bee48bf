"""The directory of a Ray cluster of our own, and what a killed run or a start that failed leaves of one."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cogvit.errors import ConfigError

_PREFIX = "cogvit-ray-"
_LOCK = ".lock"  # held as long as the directory is in use
_SOCKET_BYTES, _RAY_BYTES = 107, 62  # the longest name of a Unix socket, and what Ray puts behind its directory


@contextmanager
def scratch() -> Iterator[str]:
    """Make a directory for Ray's files for the length of the block; those of runs that were killed are removed.

    Not in TMPDIR, which may be long.
    Errors: ConfigError when there is no place for it, or its path is too long.
    """
    base = os.environ.get("RAY_TMPDIR", "/tmp")
    size, room = len(os.fsencode(base)), _SOCKET_BYTES - _RAY_BYTES - len(f"/{_PREFIX}12345678")
    if size > room:
        raise ConfigError(f"RAY_TMPDIR={base} has {size} bytes; sockets are made in it: at most {room}")
    _remove_leftovers(base)
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"RAY_TMPDIR={base} cannot be written: {error.strerror}; name a directory") from None
    with made as directory, open(os.path.join(directory, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, os.path.join(directory, _LOCK))  # or another start would find it before it is held
        yield directory


def _remove_leftovers(base: str) -> None:
    for path in Path(base).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def end_children(directory: str) -> None:
    """End the children of this process that have a directory on their command line.

    A start of Ray that fails leaves some, which Ray's shutdown knows nothing of.
    """
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and os.fsencode(directory) in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
