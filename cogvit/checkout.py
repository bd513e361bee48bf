"""The checkout that commands run from: data_pipeline, configs and tools lie beside `cogvit` there, and not in a wheel.

Commands import this module before their others. It puts the checkout before a user's own folders of these names, and
says in one line what an installation of the encoder alone lacks.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from cogvit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
_INSTALL = "pip install -e '.[train]'"
_NEEDED = ("deepspeed", "fsspec", "megatron", "pyarrow", "ray", "tqdm", "transformers", "wandb", "webdataset", "xxhash")


def lacking(root: Path) -> str:
    """Return what training lacks with `cogvit` in this folder, and the way out; empty where it lacks nothing."""
    if not (root / "data_pipeline").is_dir():
        return (
            f"{root / 'cogvit'} is the encoder alone; training, evaluation and tools are in the repository: get a"
            f" checkout and run {_INSTALL} in it"
        )
    absent = [name for name in _NEEDED if find_spec(name) is None]
    return f"{', '.join(absent)} cannot be imported; run {_INSTALL} in {root}" if absent else ""


def _enter() -> None:
    """Put the checkout first on the path. Errors: ConfigError for who imports, exit status 2 for who runs a command."""
    problem = lacking(ROOT)
    if not problem:
        if sys.path[0] != str(ROOT):
            sys.path.insert(0, str(ROOT))
        return
    command = getattr(sys.modules["__main__"], "__spec__", None)
    if command is None or not command.name.startswith("cogvit."):
        raise ConfigError(problem)
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


_enter()
