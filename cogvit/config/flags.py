"""The trainer's flags, generated from the RunConfig tree, and presets by name.

A field's flag is its dotted path: `data.global_batch_images` is `--data.global-batch-images N` or `...=N`. A bare
boolean means true, None is written `none`, tuples are JSON. A member of a tuple of named dataclasses is addressed by
its name: `--teachers.members.dinov3.path DIR`. Flags are read from left to right; the last one wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import runpy
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogvit.config.fields import RunConfig
from cogvit.config.synonyms import SYNONYMS
from cogvit.config.tree import coerce, from_json, load_config, to_json
from cogvit.errors import ConfigError

PRESETS_DIR = Path(__file__).resolve().parents[2] / "configs"
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Slot:
    """A settable place in the JSON form of a configuration."""

    path: str  # dotted, as fields are spelt
    values: dict[str, Any]  # the JSON object that holds it
    key: str
    hint: Any
    help: str

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return "--" + self.path.replace("_", "-")


@dataclass(frozen=True)
class Syntax:
    """How values of one type are written."""

    read: Callable[[str], Any]  # ValueError or KeyError when the text is not of the type
    word: str  # in --help
    expects: str  # in errors


def parse(preset: RunConfig, argv: list[str]) -> RunConfig:
    """Return the preset with the flags applied.

    Errors: ConfigError for an unknown flag, a missing value, a value of another type, or one that the field refuses.
    """
    values = to_json(preset)
    words = list(argv)
    while words:
        flag, equals, text = words.pop(0).partition("=")
        slot = _find(flag, values)
        if not equals:
            text = _take_value(slot, words)
        slot.values[slot.key] = _read(slot, text)
    return from_json(RunConfig, values)


def flags_given(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return the flags of a command line that `parse` has read, as they are spelt and as paths of fields."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return [(flag, flag.removeprefix("--").replace("-", "_")) for flag in flags]


def settable(preset: RunConfig) -> list[Slot]:
    """Return every place of a configuration that a flag sets, with the preset's values."""
    return list(_slots(RunConfig, to_json(preset), ""))


def word_of(slot: Slot) -> str:
    """Return how the values of a flag are written, for help."""
    return _syntax(slot.hint).word


def load_preset(name: str) -> RunConfig:
    """Return the configuration that configs/NAME.py, a path to such a file, or a path to a config.json describes.

    Errors: ConfigError when there is none, with the names of those that exist.
    """
    if name.startswith("-"):
        raise ConfigError(
            f"the preset is missing before {name}: python -m cogvit.train PRESET {name} ...; "
            f"presets: {', '.join(preset_names())}"
        )
    if name.endswith(".json"):
        return load_config(Path(name))
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigError(f"preset file {name} does not exist")
        module = runpy.run_path(name)
    elif name in (names := preset_names()):
        module = vars(importlib.import_module(f"configs.{name}"))
    else:
        raise ConfigError(f"there is no preset {name!r}{_suggestion(name, names)}; presets: {', '.join(names)}")
    if "config" not in module:
        raise ConfigError(f"preset {name} has no function config() -> RunConfig")
    return typing.cast(RunConfig, module["config"]())


def presets() -> list[tuple[str, RunConfig]]:
    """Return the presets of configs/ by name."""
    return [(name, load_preset(name)) for name in preset_names()]


def purpose(name: str) -> str:
    """Return what a preset of configs/ is for: the first line of its docstring."""
    return (importlib.import_module(f"configs.{name}").__doc__ or "").strip().partition("\n")[0].rstrip(".")


def preset_names() -> list[str]:
    """Return the names of the files in configs/ that define a preset."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.py") if "\ndef config(" in path.read_text())


def _slots(kind: Any, values: dict[str, Any], prefix: str) -> Iterator[Slot]:
    """Yield the leaves of a dataclass in the order of its fields, then those of named members."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path, hint, value = prefix + field.name, hints[field.name], values[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _slots(hint, value, path + ".")
            continue
        yield Slot(path, values, field.name, hint, field.metadata.get("help", ""))
        member = next((arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)), None)
        if member is not None:
            for one in value:
                yield from _slots(member, one, f"{path}.{one['name']}.")


def _find(flag: str, values: dict[str, Any]) -> Slot:
    if not flag.startswith("--"):
        raise ConfigError(f"unexpected argument {flag!r}; flags are written --part.name VALUE")
    slots = {slot.flag: slot for slot in _slots(RunConfig, values, "")}
    found = slots.get(flag.replace("_", "-"))
    if found is None and (meant := SYNONYMS.get(flag.replace("_", "-"))):
        raise ConfigError(f"unknown flag {flag}; here it is {meant}")
    if found is None:
        raise ConfigError(f"unknown flag {flag}{_suggestion(flag, list(slots))}; --help lists all")
    return found


def _suggestion(word: str, known: list[str]) -> str:
    """Return "; did you mean X?" for the known name that shares most words with this one, or looks most like it."""
    parts = set(re.split(r"[._-]+", word))

    def likeness(name: str) -> tuple[int, float]:
        own_parts = re.split(r"[._-]+", name.rpartition(".")[2])
        return len(parts & set(own_parts) - {""}), difflib.SequenceMatcher(None, word, name).ratio()

    nearest = max(known, key=likeness, default="")
    return f"; did you mean {nearest}?" if likeness(nearest) > (0, 0.6) else ""


def _take_value(slot: Slot, words: list[str]) -> str:
    """Take the flag's value off the words that follow it; a boolean may stand alone."""
    if slot.hint is bool and not (words and words[0].lower() in _TRUTH):
        return "true"
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{slot.flag} needs a value: {_syntax(slot.hint).expects}")
    return words.pop(0)


def _read(slot: Slot, text: str) -> Any:
    """Return a flag's text as the JSON value of its field."""
    syntax = _syntax(slot.hint)
    try:
        value = syntax.read(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{slot.flag} {text}: must be {syntax.expects}") from None
    return json.loads(json.dumps(coerce(slot.hint, value, slot.path), default=dataclasses.asdict))


def _syntax(hint: Any) -> Syntax:
    """Return how a field's type is written on the command line."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = _syntax(next(arg for arg in args if arg is not types.NoneType))
        return Syntax(
            lambda text: None if text.lower() == "none" else inner.read(text),
            f"{inner.word}|none",
            f"{inner.expects} or none",
        )
    if origin is Literal:
        legal = {str(arg): arg for arg in args}
        return Syntax(legal.__getitem__, "|".join(legal), f"one of {', '.join(legal)}")
    if origin is tuple:
        example = {str: '["NAME"]', tuple[str, float]: '[["NAME", 1.0]]'}.get(args[0])
        return Syntax(json.loads, "JSON", "a JSON list" + (f", such as '{example}'" if example else ""))
    if hint is bool:
        return Syntax(lambda text: _TRUTH[text.lower()], "[true|false]", "true or false")
    if hint is str:  # a shell expands ~ where it begins a word, and in --out=~/x it does not
        return Syntax(lambda text: os.path.expanduser(text) if text.startswith("~/") else text, "TEXT", "text")
    word, expects = {int: ("N", "a whole number"), float: ("X", "a number")}[hint]
    return Syntax(hint, word, expects)
