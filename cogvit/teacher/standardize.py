"""Standardization of the teachers' features: mean and deviation of every channel, or PHI-S.

PHI-S subtracts the mean, rotates into the principal axes and from there by a Hadamard matrix, which gives every channel
the same share of every axis and so the same variance, and divides by one scale. Distances keep their proportions, so no
channel that a teacher hardly uses is blown up. Source: Ranzinger et al., arXiv 2410.01680.

The statistics are fitted by tools.fit_teacher_stats or when a run starts, and kept in the run directory with the
fingerprint of the teacher they belong to, so that a resumed run regresses the same numbers to the bit. They are applied
where features arrive, the same for every source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvit.errors import ConfigError
from cogvit.teacher.stream import FeatureRequest, Features, FeatureSource, rows_of_images, submit_ahead

_SMALLEST_STD = 1e-6  # a channel that varies less is constant: it becomes 0 instead of amplified rounding noise


Method = Literal["channel", "phi_s"]


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each channel of one teacher."""

    mean: Tensor  # [C] float32
    std: Tensor  # [C] float32, positive
    fingerprint: str  # of the teacher

    def apply(self, features: Tensor) -> Tensor:
        """Return (features - mean) / std for [..., C] features, in float32."""
        return (features.float() - self.mean.to(features.device)) / self.std.to(features.device)


@dataclass(frozen=True)
class RotationStats:
    """Mean, and rotation divided by scale, of one teacher."""

    mean: Tensor  # [C] float32
    rotation: Tensor  # [C, C] float32
    fingerprint: str  # of the teacher

    def apply(self, features: Tensor) -> Tensor:
        """Return rotation (features - mean) for [..., C] features, in float32."""
        return (features.float() - self.mean.to(features.device)) @ self.rotation.T.to(features.device)


Stats = ChannelStats | RotationStats
_PARTS: dict[Method, tuple[type[Stats], str]] = {
    "channel": (ChannelStats, "std"),
    "phi_s": (RotationStats, "rotation"),
}  # what is stored beside the mean


@dataclass(frozen=True)
class Standardized:
    """Another source's features with mean 0 and deviation 1 in every channel."""

    source: FeatureSource
    stats: Mapping[str, Stats]

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


@dataclass
class _Moments:
    """Sums over the tokens of one teacher, in float64; the second are [C] squares or [C, C] products."""

    count: int
    first: Tensor
    second: Tensor

    def add(self, x_MC: Tensor) -> None:
        x_MC = x_MC.double()
        self.count += len(x_MC)
        self.first += x_MC.sum(dim=0)
        self.second += x_MC.square().sum(dim=0) if self.second.ndim == 1 else x_MC.T @ x_MC


def fit_stats(
    source: FeatureSource, requests: Iterable[FeatureRequest], fingerprints: Mapping[str, str], method: Method
) -> dict[str, Stats]:
    """Fit the statistics of every teacher over all tokens that the requests ask for, in float64.

    An image that does not decode, whose features are all 0, does not count.
    Errors: ConfigError when the requests hold no image, or PHI-S has no rotation for a teacher's width.
    """
    moments = {}
    for name, dim in source.dims.items():
        shape = (dim,) if method == "channel" else (dim, dim)
        moments[name] = _Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    for request, handle in submit_ahead(requests, source.submit, in_flight=2):
        for name, x_MC in source.result(handle).items():
            decoded = [image for image in x_MC.split(rows_of_images(name, request)) if image.any()]
            moments[name].add(torch.cat([x_MC[:0], *decoded]))
    if not all(sums.count for sums in moments.values()):
        raise ConfigError("the teachers' statistics need at least one image that decodes; check --data.shards")
    fit = _fit_channels if method == "channel" else _fit_rotation
    return {name: fit(moments[name], fingerprint) for name, fingerprint in fingerprints.items()}


def _fit_channels(sums: _Moments, fingerprint: str) -> ChannelStats:
    mean = sums.first / sums.count
    std = (sums.second / sums.count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > _SMALLEST_STD, std, torch.ones_like(std))
    return ChannelStats(mean.float(), std.float(), fingerprint)


def _fit_rotation(sums: _Moments, fingerprint: str) -> RotationStats:
    mean_C = sums.first / sums.count
    covariance_CC = sums.second / sums.count - mean_C[:, None] * mean_C[None, :]
    variance_C, axes_CC = torch.linalg.eigh(covariance_CC)
    scale = variance_C.clamp(min=0).mean().sqrt().clamp(min=_SMALLEST_STD)
    rotation_CC = hadamard(len(mean_C)) @ axes_CC.T / scale
    return RotationStats(mean_C.float(), rotation_CC.float(), fingerprint)


def hadamard(order: int) -> Tensor:
    """Return an orthogonal [C, C] float64 matrix whose entries are all +-1 / sqrt(C).

    Paley's construction of a prime plus one, doubled as Sylvester does; it has the usual widths (384, 768, 1024, 1152).
    Errors: ConfigError for an order that it does not reach.
    """
    core, doublings = order, 0
    while core > 2 and core % 2 == 0 and not _is_paley(core - 1):
        core, doublings = core // 2, doublings + 1
    if core > 2 and not _is_paley(core - 1):
        raise ConfigError(f"--teachers.standardize phi_s has no rotation for a width of {order}; use channel")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    if core > 2:
        matrix = _paley(core - 1)
    elif core == 2:
        doublings += 1
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / order**0.5


def _is_paley(q: int) -> bool:
    return q % 4 == 3 and all(q % divisor for divisor in range(3, int(q**0.5) + 1, 2))


def _paley(q: int) -> Tensor:
    """Return Paley's Hadamard matrix of order q + 1 for a prime q = 3 (mod 4), of float64 +-1."""
    number = torch.arange(q)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[number.square() % q] = 1.0
    character[0] = 0.0
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(number[:, None] - number[None, :]) % q]
    return skew + torch.eye(q + 1, dtype=torch.float64)


def save_stats(path: Path, stats: Mapping[str, Stats]) -> None:
    """Write the statistics of all teachers to one file, whole or not at all. Errors: ConfigError when it cannot be."""
    tensors = {f"{name}.mean": s.mean for name, s in stats.items()}
    for name, s in stats.items():
        tensors |= {f"{name}.std": s.std} if isinstance(s, ChannelStats) else {f"{name}.rotation": s.rotation}
    with _unfinished(path) as unfinished:
        save_file(tensors, unfinished, metadata={name: s.fingerprint for name, s in stats.items()})
        unfinished.replace(path)


def try_place(path: Path) -> None:
    """Write nothing where statistics are to go, before they are fitted. Errors: ConfigError when it cannot be."""
    with _unfinished(path) as unfinished:
        unfinished.touch()


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield a name beside a path for what is not whole yet; nothing is left of it. Errors: ConfigError."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {error}; make room or choose another --out") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def load_stats(path: Path, fingerprints: Mapping[str, str], method: Method, way_out: str) -> dict[str, Stats]:
    """Read the statistics of the named teachers; way_out ends the message of what is refused.

    Errors: ConfigError when the file does not read, lacks a teacher, is of another method, or was fitted on a teacher
    with other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            fitted, names = file.metadata() or {}, set(file.keys())
            kind, part = _PARTS[method]
            for name, fingerprint in fingerprints.items():
                if fitted.get(name) != fingerprint:
                    raise ConfigError(
                        f"{path} was fitted on another teacher {name!r} ({fitted.get(name, 'none')[:12]}, now"
                        f" {fingerprint[:12]}); {way_out}"
                    )
                if f"{name}.{part}" not in names:
                    raise ConfigError(f"{path} was not fitted for --teachers.standardize {method}; {way_out}")
            return {
                name: kind(file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.{part}"), fingerprint)
                for name, fingerprint in fingerprints.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} does not read: {error}") from error
