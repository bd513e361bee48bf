"""Command lines of the small commands."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cogvit.config.arguments import read_arguments, run_command
from cogvit.errors import ConfigError


@dataclass(frozen=True)
class Copy:
    first: str
    others: tuple[str, ...]
    index_dir: str = "default"
    out: str = ""


def test_words_and_flags_in_any_order() -> None:
    argv = ["--index-dir=a=b", "one", "--out", "dir", "two=2", "three"]
    assert read_arguments(Copy, argv) == Copy("one", ("two=2", "three"), "a=b", "dir")
    assert read_arguments(Copy, ["one", "two"]) == Copy("one", ("two",))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["one"], "OTHERS is missing"),
        ([], "FIRST OTHERS is missing"),
        (["one", "two", "--index_dir", "x"], "did you mean --index-dir"),
        (["one", "two", "-x"], "unknown flag -x"),
        (["one", "two", "--out"], "--out needs a value"),
        (["one", "two", "--out", "--index-dir", "x"], "--out needs a value"),
        (["one", "two", "--out="], "--out needs a value"),
    ],
)
def test_mistakes(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_arguments(Copy, argv)


@dataclass(frozen=True)
class FlagsAlone:
    """A command that needs nothing."""

    rounds: str = "3"


@dataclass(frozen=True)
class OneWord:
    """A command that needs a word."""

    run: str


def test_no_arguments_run_a_command_that_needs_none_and_explain_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([], "usage of it", FlagsAlone, lambda arguments: int(arguments.rounds)) == 3
    assert capsys.readouterr().out == ""
    assert run_command([], "usage of it", OneWord, lambda arguments: 0) == 2
    assert capsys.readouterr().out == "usage of it\n"
