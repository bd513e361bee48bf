"""Features computed once and read from disk: DIR/TEACHER/SHARD.safetensors, one file for each data shard and teacher.

A file holds the features of every token of the shard's images end to end, in the teacher's precision and before
standardization, and says in its header whose they are: the fingerprint of the teacher, and the contents, a hash of the
images' ids, bytes and grids. A file that says anything else than the run expects is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvit.errors import ConfigError, DataError
from cogvit.objective.masking import mask_image
from cogvit.teacher.stream import FeatureRequest, Features

_VERSION = "1"
_OPEN_FILES = 128
_COMMAND = "run python -m tools.precompute_features"


@dataclass(frozen=True)
class ShardFeatures:
    """One open file of the store."""

    file: Any  # safetensors handle, memory-mapped
    start_S: Tensor  # [S + 1] int64, first token of each sample
    place: dict[int, int]  # sample id -> s

    def read(self, sample_id: int) -> Tensor:
        """Return the features of all tokens of one image, [n, C]."""
        place = self.place[sample_id]
        return self.file.get_slice("features")[int(self.start_S[place]) : int(self.start_S[place + 1])]


def shard_name(shard: str) -> str:
    """Return what names a data shard in the store: its file name."""
    return shard.rpartition("/")[2]


def contents_of(shards: Sequence[str], rows: NDArray[Any], grid_hw: NDArray[np.int64]) -> dict[str, str]:
    """Return a hash of the ids, bytes and grids of its images for the name of each shard that has any.

    rows has the fields shard (a place in shards), sample_id and content_hash; grid_hw is [S, 2].
    Errors: ConfigError when two shards have one name.
    """
    contents: dict[str, str] = {}
    for number, shard in enumerate(shards):
        if shard_name(shard) in contents:
            raise ConfigError(f"two shards are named {shard_name(shard)}; a feature store needs names that differ")
        here = np.flatnonzero(rows["shard"] == number)
        if len(here) == 0:
            continue
        columns = np.column_stack([rows["sample_id"][here], rows["content_hash"][here], grid_hw[here]])
        contents[shard_name(shard)] = hashlib.sha256(columns.astype("<i8").tobytes()).hexdigest()
    return contents


def headers_of(
    fingerprints: Mapping[str, str], contents: Mapping[str, str], precision: str
) -> dict[tuple[str, str], dict[str, str]]:
    """Return by (teacher, shard name) what its file must say of itself."""
    return {
        (teacher, shard): {
            "version": _VERSION,
            "teacher": fingerprint,
            "contents": content,
            "precision": precision,
        }
        for teacher, fingerprint in fingerprints.items()
        for shard, content in contents.items()
    }


def path_of(directory: Path, teacher: str, shard: str) -> Path:
    """Return where the features of a shard lie."""
    return directory / teacher / f"{shard}.safetensors"


def is_complete(path: Path, header: Mapping[str, str]) -> bool:
    """Whether a file is there, has its full length, and says what it must."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == header
    except (OSError, SafetensorError):
        return False


def write_shard(path: Path, header: dict[str, str], sample_ids: Sequence[int], features: Sequence[Tensor]) -> None:
    """Write the [n, C] features of each sample of a shard to one file, whole or not at all."""
    tensors = {
        "features": torch.cat(list(features)),
        "sample_id": torch.tensor(sample_ids, dtype=torch.int64),
        "start": torch.tensor([0, *(len(feature) for feature in features)]).cumsum(0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, unfinished, metadata=header)
    unfinished.replace(path)


class StoreFeatures:
    """A store as a FeatureSource: its headers are what the run expects of every file that it may read."""

    def __init__(
        self, directory: Path, headers: Mapping[tuple[str, str], dict[str, str]], dims: Mapping[str, int]
    ) -> None:
        self._directory = directory
        self._headers = headers
        self._dims = dims
        self._open = lru_cache(_OPEN_FILES)(self._open_shard)

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher, by name."""
        return self._dims

    def submit(self, request: FeatureRequest) -> FeatureRequest:
        """Keep the request; files are read when the result is asked for."""
        return request

    def result(self, handle: FeatureRequest) -> Features:
        """Read the features.

        Errors: ConfigError when a shard has no file or its file is of another teacher, precision or set of images;
        DataError when a file is damaged.
        """
        return {name: self._read(name, handle) for name in self._dims}

    def _read(self, name: str, request: FeatureRequest) -> Tensor:
        rows = [torch.zeros(0, self._dims[name])]
        for sample, grid, key in zip(request.samples, request.grids, request.keys, strict=True):
            if sample is not None:
                features = self._open(name, shard_name(sample.shard)).read(sample.sample_id)
                rows.append(features[mask_image(key, grid[0] * grid[1], request.mask_ratio)].float())
        return torch.cat(rows)

    def _open_shard(self, name: str, shard: str) -> ShardFeatures:
        path = path_of(self._directory, name, shard)
        if not path.exists():
            raise ConfigError(f"the store has no {path}; {_COMMAND}")
        try:
            file = safe_open(path, "pt")
            header = file.metadata() or {}
            sample_ids, start_S = file.get_tensor("sample_id").tolist(), file.get_tensor("start")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it and {_COMMAND}") from error
        expected = self._headers.get((name, shard), {})
        wrong = [field for field in expected.keys() | header.keys() if header.get(field) != expected.get(field)]
        if wrong:
            raise ConfigError(f"{path} was made with other {', '.join(sorted(wrong))} than this run's; {_COMMAND}")
        return ShardFeatures(file, start_S, {sample_id: place for place, sample_id in enumerate(sample_ids)})
