"""The report of runs that go on, on a port of this machine alone: the same page, read anew for each look at it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cogvit.errors import CogViTError, ConfigError

REFRESH_S = 10


def page_server(page: Callable[[], str], port: int) -> ThreadingHTTPServer:
    """Return a server of one page on localhost; port 0 takes a free one.

    page: makes it; an error that a user can act on becomes the page.
    Errors: ConfigError when the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                body = page()
            except CogViTError as error:  # a run that has not written its first line yet
                body = f'<meta http-equiv="refresh" content="{REFRESH_S}"><p>{error}</p>'
            data = body.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each look."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(
            f"--port {port} cannot be used: {error.strerror}; choose another, or 0 for a free one"
        ) from None


def serve(server: ThreadingHTTPServer) -> None:
    """Serve until Ctrl-C."""
    print(
        f"http://127.0.0.1:{server.server_address[1]}/ shows the report every {REFRESH_S} s; Ctrl-C ends it", flush=True
    )
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
