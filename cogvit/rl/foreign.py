"""Code of a user's file: FILE.py:NAME on the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from cogvit.errors import ConfigError


def from_file(said: str, path: Path, name: str) -> Any:
    """Return what a Python file has under a name; None where it has nothing.

    said: the flag and its value, for errors. Errors: ConfigError when the file is none or does not load.
    """
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{said}: {path} is no Python file: {error.strerror}") from None
    try:
        return getattr(_module(path, code), name, None)
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{said}: {path} does not load: {told}") from None


@cache
def _module(path: Path, code: bytes) -> ModuleType:
    """Run a file once in a process: it may read data. Errors: what it raises."""
    name = f"task_{path.stem}_{hashlib.blake2b(bytes(path.resolve()), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
