"""Standardization of the teachers' features: mean and deviation of every channel, fitted once per run.

The statistics are kept in the run directory with the fingerprint of the teacher they belong to, so that a resumed run
regresses the same numbers to the bit. They are applied where features arrive, the same for every source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvit.errors import ConfigError
from cogvit.teacher.stream import FeatureRequest, Features, FeatureSource, submit_ahead

_SMALLEST_STD = 1e-6  # a channel that varies less is constant: it becomes 0 instead of amplified rounding noise


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each channel of one teacher."""

    mean: Tensor  # [C] float32
    std: Tensor  # [C] float32, positive
    fingerprint: str  # of the teacher

    def apply(self, features: Tensor) -> Tensor:
        """Return (features - mean) / std for [..., C] float32 features."""
        return (features - self.mean.to(features.device)) / self.std.to(features.device)


@dataclass(frozen=True)
class Standardized:
    """Another source's features with mean 0 and deviation 1 in every channel."""

    source: FeatureSource
    stats: Mapping[str, ChannelStats]

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher, by name."""
        return self.source.dims

    def submit(self, request: FeatureRequest) -> Any:
        """Ask the source."""
        return self.source.submit(request)

    def result(self, handle: Any) -> Features:
        """Standardize what the source answers."""
        return {name: self.stats[name].apply(features) for name, features in self.source.result(handle).items()}


def fit_stats(
    source: FeatureSource, requests: Iterable[FeatureRequest], fingerprints: Mapping[str, str]
) -> dict[str, ChannelStats]:
    """Fit the statistics of every teacher over all tokens that the requests ask for, in float64.

    Errors: ConfigError when the requests hold no image.
    """
    count = 0
    total = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in source.dims.items()}
    squares = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in source.dims.items()}
    for _, handle in submit_ahead(requests, source.submit, in_flight=2):
        features = source.result(handle)
        count += max(len(x) for x in features.values())
        for name, x in features.items():
            total[name] += x.double().sum(dim=0)
            squares[name] += x.double().square().sum(dim=0)
    if count == 0:
        raise ConfigError("the teachers' statistics need at least one image that decodes; check --data.shards")
    stats = {}
    for name, fingerprint in fingerprints.items():
        mean = total[name] / count
        std = (squares[name] / count - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std > _SMALLEST_STD, std, torch.ones_like(std))
        stats[name] = ChannelStats(mean.float(), std.float(), fingerprint)
    return stats


def save_stats(path: Path, stats: Mapping[str, ChannelStats]) -> None:
    """Write the statistics of all teachers to one file, whole or not at all."""
    tensors = {f"{name}.{part}": getattr(s, part) for name, s in stats.items() for part in ("mean", "std")}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, unfinished, metadata={name: s.fingerprint for name, s in stats.items()})
    unfinished.replace(path)


def load_stats(path: Path, fingerprints: Mapping[str, str]) -> dict[str, ChannelStats]:
    """Read the statistics of the named teachers.

    Errors: ConfigError when the file does not read, lacks a teacher, or was fitted on a teacher with other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            fitted = file.metadata() or {}
            for name, fingerprint in fingerprints.items():
                if fitted.get(name) != fingerprint:
                    raise ConfigError(
                        f"{path} was fitted on another teacher {name!r} ({fitted.get(name, 'none')[:12]}, now"
                        f" {fingerprint[:12]}); pass the teacher the run began with, or choose another --out"
                    )
            return {
                name: ChannelStats(file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.std"), fingerprint)
                for name, fingerprint in fingerprints.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} does not read: {error}") from error
