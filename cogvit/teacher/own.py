"""A teacher of the user's own: any torch module behind a TeacherWrapper, named by the function that makes it.

`package.module:function` is imported and called without arguments wherever the teacher is needed: in the trainer and in
every actor. It must make the same weights each time.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import traceback
from pathlib import Path

import torch

from cogvit.errors import ConfigError
from cogvit.model.mim import TeacherWrapper


def is_own(path: str) -> bool:
    """Whether a teacher's path names a function."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path) is not None


def make_wrapper(path: str) -> TeacherWrapper:
    """Import and call `package.module:function`. Errors: ConfigError with the place of what goes wrong."""
    module_name, _, name = path.partition(":")
    try:
        wrapper = getattr(importlib.import_module(module_name), name)()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"teacher {path} cannot be made: {reason} ({last.filename}:{last.lineno})") from error
    if not isinstance(wrapper, TeacherWrapper):
        raise ConfigError(f"teacher {path} must return a cogvit.TeacherWrapper, not a {type(wrapper).__name__}")
    return wrapper


def wrapper_digest(path: str) -> str:
    """Return a hash of what decides the features: the function's file, its numbers and the weights it makes."""
    wrapper = make_wrapper(path)
    module_name, _, name = path.partition(":")
    numbers = (name, wrapper.feature_dim, wrapper.out_grid, wrapper.patch_size)
    digest = hashlib.sha256(repr(numbers).encode())
    digest.update(Path(str(importlib.import_module(module_name).__file__)).read_bytes())
    for key, tensor in sorted(wrapper.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
