"""Command lines of the commands that take a few words and flags; the trainer's many are in `flags.py` beside this file.

A dataclass says what a command takes and the command's docstring is its help.
"""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from cogvit.config.environment import speaks
from cogvit.errors import CogViTError, ConfigError

Arguments = TypeVar("Arguments")


def run_command(argv: list[str], usage: str, kind: type[Arguments], run: Callable[[Arguments], int]) -> int:
    """Print the usage, or read the arguments and run the command; returns the exit status.

    Without arguments a command that needs some prints its usage too, and the status is 2. An error that the user can
    act on becomes one line.
    """
    lacks_words = not argv and any(member.default is MISSING for member in fields(kind))  # type: ignore[arg-type]
    if lacks_words or asks_for_help(argv):
        if speaks():
            print(usage.strip())
        return 2 if lacks_words else 0
    try:
        return run(read_arguments(kind, argv))
    except CogViTError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def asks_for_help(argv: list[str]) -> bool:
    """Whether --help or -h stands anywhere on a command line."""
    return "--help" in argv or "-h" in argv


def read_arguments(kind: type[Arguments], argv: list[str]) -> Arguments:
    """Return a dataclass of strings filled from a command line.

    Fields without a default are words, in order; the last of them takes one or more where it is a tuple. A field with
    a default is a flag: `index_dir` is `--index-dir VALUE` or `--index-dir=VALUE`; one that is a bool stands alone.
    Errors: ConfigError for an unknown flag, a missing value, a missing word or one too many.
    """
    members = fields(kind)  # type: ignore[arg-type]
    flags = {f"--{member.name.replace('_', '-')}": member.name for member in members if member.default is not MISSING}
    kinds = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in flags:
            near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(flag, flags, n=1))
            raise ConfigError(f"unknown flag {flag}{near or '; --help explains all'}")
        if kinds[flags[flag]] is bool and not equals:
            values[flags[flag]] = True
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if not value:
            raise ConfigError(f"{flag} needs a value; --help explains it")
        values[flags[flag]] = value
    places = [member.name for member in members if member.default is MISSING]
    return kind(**values, **_place(words, places, many=_takes_many(kind, places)))


def take_flag(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take a command's own flag and its value out of a command line whose other flags are the trainer's.

    Returns None where it is not there. Errors: ConfigError where it has no value.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in words:
        return None, argv
    place = words.index(flag)
    value = next(iter(words[place + 1 : place + 2]), "")
    if not value or value.startswith("--"):
        raise ConfigError(f"{flag} needs a value; --help explains it")
    return value, words[:place] + words[place + 2 :]


def _takes_many(kind: type, places: list[str]) -> bool:
    return bool(places) and typing.get_origin(typing.get_type_hints(kind)[places[-1]]) is tuple


def _place(words: list[str], places: list[str], *, many: bool) -> dict[str, Any]:
    if len(words) < len(places):
        missing = " ".join(name.upper() for name in places[len(words) :])
        raise ConfigError(f"{missing} is missing; --help explains it")
    if many:
        last = len(places) - 1
        return {**dict(zip(places, words[:last], strict=False)), places[last]: tuple(words[last:])}
    if len(words) > len(places):
        raise ConfigError(f"unexpected word {words[len(places)]!r}; quote patterns, and see --help")
    return dict(zip(places, words, strict=True))
