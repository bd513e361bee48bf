"""A configuration as strict JSON, in and out: what a run directory stores, and what flags change."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from cogvit.config.fields import RunConfig
from cogvit.errors import ConfigError

Node = TypeVar("Node")


def to_json(config: Any) -> dict[str, Any]:
    """Return the tree as plain JSON values; `from_json` gives back an equal tree."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[Node], values: dict[str, Any]) -> Node:
    """Build a config dataclass from JSON values. Errors: ConfigError names unknown, missing or mistyped fields."""
    return _build(kind, values, where="")


def load_config(path: Path) -> RunConfig:
    """Read config.json of a run. Errors: ConfigError, with the path, when it is missing or no run's configuration."""
    try:
        return read_config(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist; is {path.parent} a run directory?") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path} is not of a run of this version: {error}") from None


def read_config(content: bytes) -> RunConfig:
    """Return the configuration that a config.json holds. Errors: ConfigError says what else it is."""
    try:
        return from_json(RunConfig, json.loads(content))
    except (ValueError, RecursionError) as error:  # no UTF-8 either
        raise ConfigError(f"it is not JSON ({error})") from None


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the configuration'} must be an object, not {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown configuration field {where}{unknown[0]}")
    try:
        return kind(**{name: coerce(hints[name], value, f"{where}{name}") for name, value in values.items()})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where.rstrip('.') or 'configuration'}: {error}") from None


def coerce(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against a field's type and return it as that type."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}={value!r} must be one of {', '.join(map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(coerce(i, v, f"{where}[{n}]") for n, (i, v) in enumerate(zip(items, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={value!r} is not of type {_told(hint)}")


def _told(hint: Any) -> str:
    """A type in words: lists as JSON has them."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple:
        return str(getattr(hint, "__name__", hint))
    return f"list of {_told(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(map(_told, args))}]"
