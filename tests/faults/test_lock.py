"""Two processes and one run directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cogvit.errors import ConfigError
from cogvit.training.lock import LOCK, check_free, run_lock

OWNER = """
import sys
from pathlib import Path
from cogvit.training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def owner(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is told to end."""
    command = [sys.executable, "-c", OWNER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_a_run_that_is_running_is_refused_with_its_owner(tmp_path: Path) -> None:
    with (
        owner(tmp_path) as process,
        pytest.raises(ConfigError, match=rf"process {process.pid} on .* since 20\d\d-"),
        run_lock(tmp_path, wait_s=0.3),
    ):
        pytest.fail("two runs in one directory")


def test_whether_a_run_is_running_is_asked_without_a_trace(tmp_path: Path) -> None:
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with owner(tmp_path) as process:
        named = (tmp_path / LOCK).read_text()
        with pytest.raises(ConfigError, match=f"in use by process {process.pid} on "):
            check_free(tmp_path, wait_s=0.3)
    check_free(tmp_path)
    assert (tmp_path / LOCK).read_text() == named  # it was killed, which the next start is to say


def test_a_killed_owner_holds_nothing_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with owner(tmp_path) as process:
        process.kill()
        process.wait()
        with run_lock(tmp_path, wait_s=5.0):
            assert f"process {process.pid} on" in caplog.text and "did not end by itself" in caplog.text
    assert (tmp_path / LOCK).read_text() == ""


def test_an_orderly_end_leaves_nothing_to_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with owner(tmp_path) as process:
        process.communicate("\n")
    with run_lock(tmp_path):
        assert caplog.text == ""
