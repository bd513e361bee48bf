"""What every test shares: the worker pool, a time limit, and an environment without network or surprises."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from hypothesis import settings

from tests.pool import Pool

# Before anything imports torch, transformers or wandb.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# A shell that is no terminal's starts what it runs beside itself with Ctrl-C ignored, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("project", deadline=None)  # the machine is shared: wall time of one example says nothing
settings.load_profile("project")

DEFAULT_TIMEOUT_S = 240.0  # of a hang: tests share two cores with each other and, in CI, with a cluster


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-matrix` turns on."""
    parser.addoption("--matrix", action="store_true", help="train every legal layout, not a cover of them")


@pytest.fixture(scope="session")
def pool() -> Pool:
    """The gloo workers of the whole run."""
    return Pool()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each suite took, fixtures included: seconds of one of the processes that run side by side."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    lines = [f"{seconds[suite]:7.0f} s  {suite}" for suite in sorted(seconds, key=seconds.__getitem__, reverse=True)]
    terminalreporter.write("\n".join(["", *lines, ""]))


@contextmanager
def time_limit(item: pytest.Item) -> Iterator[None]:
    """Fail the test when it runs longer than its `timeout` marker or the default allows."""
    marker = item.get_closest_marker("timeout")
    limit_s = float(marker.args[0]) if marker else DEFAULT_TIMEOUT_S

    def expire(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {limit_s} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the fixtures."""
    with time_limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the test."""
    with time_limit(item):
        return (yield)
