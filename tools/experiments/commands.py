"""What experiments have of commands: numbers of their own flags, and runs of the project's commands in this process."""

from __future__ import annotations

from cogvit import train
from cogvit.errors import ConfigError


def train_run(*words: object) -> None:
    """Run `cogvit.train` in this process. Errors: ConfigError where it ends with an error, which it has printed."""
    succeed(train.main([str(word) for word in words]))


def succeed(status: int) -> None:
    """Errors: ConfigError where a command has ended with an error, which it has printed."""
    if status:
        raise ConfigError("a command failed; its reason stands above")


def positive(flag: str, value: str) -> int:
    """Return the number of a flag. Errors: ConfigError when it is no positive whole number."""
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"--{flag.replace('_', '-')} {value} must be a positive whole number")
    return int(value)


def whole_numbers(flag: str, values: str) -> list[int]:
    """Return the numbers of a flag. Errors: ConfigError when they are no whole numbers with commas between."""
    if not all(value.isdigit() for value in values.split(",")):
        raise ConfigError(f"--{flag} {values} must be whole numbers with commas between")
    return [int(value) for value in values.split(",")]
