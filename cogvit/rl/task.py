"""What a task is: it shows something and asks, hears answers, and says what the last one is worth."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from cogvit.errors import ConfigError
from cogvit.model.chat import Message
from cogvit.rl.families import FAMILIES

_METHODS = {"reset": ("seed",), "step": ("text",), "verify": ("answer",)}


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
        make: Any = _from_file(name) if ":" in name else FAMILIES.get(name)
        if make is None:
            raise ConfigError(f"--rl.tasks {name} is unknown; tasks are {', '.join(FAMILIES)} and FILE.py:NAME")
        source = make.source
        if source in found:
            raise ConfigError(f"--rl.tasks {names} has two tasks of the source {source!r}; each needs its own")
        found[source] = make
    if not found:
        raise ConfigError(f"--rl.tasks {names!r} names no task; tasks are {', '.join(FAMILIES)} and FILE.py:NAME")
    return found


def _from_file(name: str) -> Any:
    path, _, class_name = name.rpartition(":")
    task: Any = getattr(_module(Path(path), name), class_name, None)
    if not inspect.isclass(task):
        raise ConfigError(f"--rl.tasks {name}: {path} has no class {class_name}")
    lacking = [f"{method}({', '.join(names)})" for method, names in _METHODS.items() if not _takes(task, method)]
    source: object = getattr(task, "source", None)
    if not isinstance(source, str) or not source:
        lacking.insert(0, "source = 'NAME'")
    if lacking:
        raise ConfigError(f"--rl.tasks {name}: the class lacks {', '.join(lacking)}")
    return task


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"--rl.tasks {name}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--rl.tasks {name}: {path} does not load: {type(error).__name__}: {error}") from None
    return module


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
