"""Where the ranks of a run meet: a store of small values, which each has connections to and one process keeps.

torchrun's agent keeps it; else the first rank does while its ranks are few, and then a child of the first rank, so that
no rank's open files grow with their number.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from cogvit.config.environment import Process
from cogvit.errors import ConfigError
from cogvit.parallel import keep_store
from cogvit.parallel.descriptors import kept_apart


class StoreKeeper:
    """The process that keeps the store. It ends with this one; where it ends before, this one ends too.

    Without it the ranks would go on for as long as nobody asks the store: until the next checkpoint.
    """

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        command = [sys.executable, "-P", str(Path(keep_store.__file__)), host, str(port)]
        # Who stops a run signals all its processes, and the ranks need the store to save; a mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid
        self._closing = False
        assert self._process.stdout is not None
        answers = select.select([self._process.stdout], [], [], timeout_s)[0]
        said = self._process.stdout.readline().strip() if answers else f"it said nothing in {timeout_s:g} s"
        if said != keep_store.KEPT:
            self.close()
            raise _no_store(said or f"its process ended with status {self._process.returncode}")
        threading.Thread(target=self._watch, name="store keeper", daemon=True).start()

    def close(self) -> None:
        """End it: the ranks have left."""
        self._closing = True
        self._process.kill()
        self._process.wait()

    def _watch(self) -> None:
        status = self._process.wait()
        if not self._closing:
            print(
                f"error: the process {self.pid} that kept the ranks' store ended with status {status}; so does the"
                " first rank",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def join_world(process: Process, backend: str, timeout_s: float) -> StoreKeeper | None:
    """Make the group of all ranks; returns who keeps their store, where this process has started that.

    Errors: ConfigError where nobody has said where they meet, or the port is in use.
    """
    process.check_meeting()
    rank, ranks, timeout = process.rank, process.world_size, timedelta(seconds=timeout_s)
    if process.alone:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        return None
    if not kept_apart(ranks) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise _no_store(str(error)) from None
            raise
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeper = StoreKeeper(host, port, timeout_s) if rank == 0 else None
    store = dist.TCPStore(host, port, ranks, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return keeper


def _no_store(reason: str) -> ConfigError:
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in reason:
        return ConfigError(f"{place} is in use by another program; set MASTER_PORT to a free port")
    return ConfigError(f"{place}: the store that ranks meet at could not be made there: {reason}")
