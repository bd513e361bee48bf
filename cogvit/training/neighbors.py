"""Who notices that a rank is gone, while no collective is under way: its neighbors, in a ring of open connections.

The system closes a process's connections however it ends, and tells the other side at once. Two descriptors a rank.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import time
from typing import Any

_MEET_S = 20.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a node that loses its power says nothing


class Neighbors:
    """The connections of one rank to the ranks before and after it.

    fault: why there are none; then the end of a neighbor is noticed when the next step talks to it, as always.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        self._sockets: dict[int, tuple[int, socket.socket]] = {}  # by descriptor: the rank that is behind it
        self._poll = select.poll()
        self.fault = ""
        before, after = (rank - 1) % world_size, (rank + 1) % world_size
        try:
            with socket.create_server(("", 0)) as server:
                word = secrets.token_hex(16)
                store.set(f"neighbor/{rank}", f"{_own_address()} {server.getsockname()[1]} {word}")
                host, port, its_word = store.get(f"neighbor/{after}").decode().split()
                following = socket.create_connection((host, int(port)), timeout=_MEET_S)
                self._keep(after, following)
                following.sendall(its_word.encode())
                self._keep(before, _accepted(server, word))
        except OSError as error:
            self.close()
            self.fault = f"ranks {before} and {after} are not watched by rank {rank}: {error}"

    def wait(self, timeout_s: float) -> int | None:
        """Wait, but no longer than until a neighbor's process ends; returns the neighbor that is gone, if any."""
        if not self._sockets:
            time.sleep(timeout_s)
            return None
        events = self._poll.poll(1000 * timeout_s)
        return self._sockets[events[0][0]][0] if events else None

    def close(self) -> None:
        """Hang up."""
        for descriptor, (_, connection) in self._sockets.items():
            self._poll.unregister(descriptor)
            connection.close()
        self._sockets = {}

    def _keep(self, rank: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sockets[connection.fileno()] = rank, connection
        self._poll.register(connection.fileno(), select.POLLIN)  # nobody sends anything but its end


def _accepted(server: socket.socket, word: str) -> socket.socket:
    """Return the connection of who knows the word. Errors: OSError when nobody does in time."""
    end_s = time.monotonic() + _MEET_S
    while (left_s := end_s - time.monotonic()) > 0:
        server.settimeout(left_s)
        connection, _ = server.accept()
        connection.settimeout(left_s)
        said = b""
        while len(said) < len(word) and (more := connection.recv(len(word) - len(said))):
            said += more
        if said == word.encode():
            return connection
        connection.close()
    raise TimeoutError("nobody came")


def _own_address() -> str:
    """Return the address of this machine by which it reaches where the ranks met."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # which sends nothing
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])
