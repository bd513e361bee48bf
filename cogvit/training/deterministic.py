"""`--deterministic`: a run that is repeated on the same devices gives the same bits, on GPUs too.

A kernel that adds with atomics adds in no order. torch is told to take others, or to raise where it has none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cogvit.errors import ConfigError

_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats itself. Source: its guide, results reproducibility


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Take deterministic algorithms inside, where that is asked for; enter it before a library has touched the GPUs.

    Errors: ConfigError for an environment in which cuBLAS does not repeat itself, and for an operation without a
    deterministic form.
    """
    if not asked:
        yield
        return
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            f"--deterministic needs CUBLAS_WORKSPACE_CONFIG to be {' or '.join(_WORKSPACES)}, not {workspace!r}; unset"
            " it"
        )
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # switches add in the order in which messages come
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # only to warn would leave flash attention its atomics
    try:
        yield
    except RuntimeError as error:
        named = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if named is None:
            raise
        raise ConfigError(
            f"--deterministic: {named[1]} has no deterministic form on this device; leave the flag out, or the part of"
            " the model that needs it"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
