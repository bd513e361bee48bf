"""Where weights come from and go to: a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cogvit.errors import CheckpointError, ConfigError

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64,
}  # fmt: skip


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return a torch dtype from itself or its name. Errors: ConfigError for what weights cannot have."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or not found.is_floating_point:
        raise ConfigError(
            f"dtype={dtype!r} is unknown; expected one of {', '.join(_DTYPES)}, or a torch dtype of these"
        )
    return found


def local_directory(name: str | Path) -> Path:
    """Return the directory of an export, downloading it where it is a hub name and no directory.

    Errors: CheckpointError when it is neither.
    """
    path = Path(name)
    if path.is_dir() or not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except ImportError:
        raise CheckpointError(f"{name} is no directory; pip install huggingface_hub to load it from the hub") from None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{name} is no directory here, and the hub did not give it: {reason}") from None


def push_directory(write: Callable[[Path], None], repo_id: str, *, private: bool) -> str:
    """Upload what `write` puts into a directory; returns the repository's address.

    Errors: CheckpointError when huggingface_hub is not installed or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise CheckpointError("push_to_hub needs a client; pip install huggingface_hub") from None
    with TemporaryDirectory() as directory:
        write(Path(directory))
        try:
            address = HfApi().create_repo(repo_id, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repo_id, folder_path=directory)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"the hub did not take {repo_id}: {reason}") from None
    return str(address)
