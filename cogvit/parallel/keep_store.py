"""A process that keeps the store which the ranks meet at: `python keep_store.py HOST PORT`, started by `meeting.py`.

It is run by its path and imports torch alone. It says "kept", or why it cannot, in one line, and ends when its standard
input does: with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import resource
import sys

import torch.distributed as dist

KEPT = "kept"


def keep(host: str, port: int) -> None:
    """Keep the store until nobody holds the other end of the standard input."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        return
    print(KEPT, flush=True)
    sys.stdin.read()
    del store
    os._exit(0)  # torch takes a second to leave, and a next start may want the port


if __name__ == "__main__":
    keep(sys.argv[1], int(sys.argv[2]))
