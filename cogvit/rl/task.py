"""What a task is: it shows something and asks, hears answers, and says what the last one is worth."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cogvit.config.reinforcement import task_file
from cogvit.errors import ConfigError
from cogvit.model.chat import Message
from cogvit.rl.families import FAMILIES
from cogvit.rl.foreign import from_file

_METHODS = {"reset": ("seed",), "step": ("text",), "verify": ("answer",)}
_SOURCE = re.compile(r"[\w.-]+")  # a part of a metric's name


@runtime_checkable
class Task(Protocol):
    """One episode of one task, a function of its seed and the answers, so that another process may play it again.

    Attributes:
        source: names the task in metrics and in the ledger.
    """

    source: str

    def reset(self, seed: int) -> Sequence[Message]:
        """Begin the episode of a seed: the conversation so far, OpenAI-style, images as PIL images or paths."""

    def step(self, text: str) -> Sequence[Message] | None:
        """Hear an answer; returns what is said after it, or None where the episode is over."""

    def verify(self, answer: str) -> float:
        """Return what the episode was worth, from 0 to 1, after its last answer."""


NewTask = Callable[[], Task]


def tasks_of(names: str) -> dict[str, NewTask]:
    """Return what makes tasks, by source.

    Args:
        names: those of `FAMILIES` and FILE.py:NAME of a class of one's own, with commas between.

    Errors: ConfigError names what is unknown, does not load, is no task, or has the source of another.
    """
    found: dict[str, NewTask] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        file = task_file(name)
        make: Any = FAMILIES.get(name) if file is None else _from_file(name, *file)
        if make is None:
            lacks = f"names no class; pass {name}:NAME" if name.endswith(".py") else "is unknown"
            raise ConfigError(f"--rl.tasks {name} {lacks}; tasks are {', '.join(FAMILIES)} and FILE.py:NAME")
        source = make.source
        if source in found:
            raise ConfigError(f"--rl.tasks {names} has two tasks of the source {source!r}; each needs its own")
        found[source] = make
    if not found:
        raise ConfigError(f"--rl.tasks {names!r} names no task; tasks are {', '.join(FAMILIES)} and FILE.py:NAME")
    return found


def _from_file(name: str, path: Path, class_name: str) -> Any:
    task = from_file(f"--rl.tasks {name}", path, class_name)
    if not inspect.isclass(task):
        raise ConfigError(f"--rl.tasks {name}: {path} has no class {class_name}")
    lacking = [f"{method}({', '.join(names)})" for method, names in _METHODS.items() if not _takes(task, method)]
    source: object = getattr(task, "source", None)
    if not isinstance(source, str) or not _SOURCE.fullmatch(source):
        lacking.insert(0, "source = 'NAME' of letters, digits and ._-")
    if lacking:
        raise ConfigError(f"--rl.tasks {name}: the class lacks {', '.join(lacking)}")
    return task


def _takes(task: type, method: str) -> bool:
    """Whether a method can be called with its one argument."""
    function = getattr(task, method, None)
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    return True
