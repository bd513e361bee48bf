"""A feature store beside a plain file of the same size: written, read in order and at random, taking turns."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit.batch import SampleRef
from cogvit.teacher.encoding import StoreDtype, decode, encode
from cogvit.teacher.shard import open_shard, write_shard
from cogvit.teacher.store import Maker, StoreFeatures, header_of, path_of, writing
from cogvit.teacher.stream import FeatureRequest, submit_ahead

TEACHER, SHARD, CONTENTS = "teacher", "shard.tar", "0" * 64
IMAGES_PER_REQUEST = 32
MASK_RATIO = 0.35
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Setting:
    """What is stored."""

    directory: Path
    images: int
    grid: tuple[int, int]
    dim: int
    dtype: StoreDtype
    rounds: int

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def maker(self) -> Maker:
        """A teacher that nobody needs to have."""
        return Maker("f" * 64, self.dtype, self.dim)

    @property
    def path(self) -> Path:
        """The store's one file."""
        return path_of(self.directory, TEACHER, SHARD, CONTENTS)

    def samples(self, places: Sequence[int]) -> tuple[SampleRef, ...]:
        """Name some images."""
        return tuple(SampleRef(place, SHARD, 0, 0) for place in places)


def features_of(setting: Setting) -> list[Tensor]:
    """Return random features, whose channels have ranges that differ a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    scale_C = torch.logspace(-1, 1, setting.dim)
    return [torch.randn(setting.tokens, setting.dim, generator=generator) * scale_C for _ in range(setting.images)]


def write_raw(path: Path, images: Sequence[bytes]) -> None:
    """Write the images' bytes as fast as it goes and as safely: to the disk, then in one rename to its name."""
    unfinished = path.with_name("raw.part")
    with unfinished.open("wb", buffering=0) as file:
        for image in images:
            file.write(image)
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_raw(path: Path, image_bytes: int, order: Sequence[int], *, told: int) -> None:
    """Read images in an order, each into the same memory; the system is told before of so many at a time, 0 of none."""
    memory = bytearray(image_bytes)
    with path.open("rb", buffering=0) as file:
        for number, place in enumerate(order):
            for soon in order[number : number + told] if told and number % told == 0 else ():
                os.posix_fadvise(file.fileno(), soon * image_bytes, image_bytes, os.POSIX_FADV_WILLNEED)
            os.preadv(file.fileno(), [memory], place * image_bytes)


def read_whole(setting: Setting, order: Sequence[int]) -> None:
    """Read every token of the images, as tools.verify_features does."""
    features, _ = open_shard(setting.path)
    for place in order:
        features.read(place)


def read_masked(setting: Setting, order: Sequence[int]) -> None:
    """Read images as training does: requests of some images, a few ahead, the masked tokens out."""
    source = StoreFeatures(setting.directory, {TEACHER: setting.maker}, {SHARD: CONTENTS})
    requests = (
        FeatureRequest(setting.samples(places), (setting.grid,) * len(places), tuple(places), MASK_RATIO)
        for start in range(0, setting.images, IMAGES_PER_REQUEST)
        for places in [order[start : start + IMAGES_PER_REQUEST]]
    )
    for _, handle in submit_ahead(requests, source.submit, _IN_FLIGHT):
        source.result(handle)


def forget(path: Path) -> None:
    """Have the system drop what it holds of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(run: Callable[[], None]) -> float:
    """Run once, by the clock."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def store_lines(setting: Setting) -> Iterator[str]:
    """Yield a row for each way to write or read."""
    features, raw = features_of(setting), setting.directory / "raw"
    images = [encode(feature, setting.dtype)["rows"].view(torch.uint8).numpy().tobytes() for feature in features]
    in_order = list(range(setting.images))
    at_random = np.random.default_rng(0).permutation(setting.images).tolist()
    header = header_of(setting.maker, setting.dtype, CONTENTS)
    read = partial(read_raw, raw, len(images[0]))
    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "write": (partial(write_raw, raw, images), partial(write_shard, setting.path, header, in_order, features)),
        "read in order": (partial(read, in_order, told=0), partial(read_whole, setting, in_order)),
        "read at random for training": (
            partial(read, at_random, told=IMAGES_PER_REQUEST),
            partial(read_masked, setting, at_random),
        ),
    }
    with writing(setting.directory, {TEACHER: setting.maker}, setting.dtype):
        for run in pairs["write"]:
            run()  # the files that are read
    for name, contenders in pairs.items():
        for cached in (False,) if name == "write" else (False, True):
            yield row(setting, f"{name}{', from memory' if cached else ''}", contenders, raw, cached=cached)
    raw.unlink()


def row(setting: Setting, name: str, contenders: tuple[Callable[[], None], ...], raw: Path, *, cached: bool) -> str:
    """Run the contenders in turn, first one first, then the other, and put the medians in a row."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(setting.rounds):
        turn = deque(zip(contenders, found, strict=True))
        turn.rotate(number)
        for run, times in turn:
            for path in () if cached else (raw, setting.path):
                forget(path)
            times.append(seconds(run))
    megabytes = setting.path.stat().st_size / 1e6
    plain, ours = (megabytes / statistics.median(times) for times in found)
    return f"| {setting.dtype} | {name} | {plain:,.0f} | {ours:,.0f} | {ours / plain:.0%} |"


def size_line(setting: Setting) -> str:
    """Return a row with the bytes of an image."""
    stored = setting.path.stat().st_size / setting.images
    values = (
        setting.tokens
        * setting.dim
        * torch.empty(0, dtype=encode(torch.zeros(1, 1), setting.dtype)["rows"].dtype).itemsize
    )
    return f"| {setting.dtype} | {stored:,.0f} | {stored / values - 1:.2%} |"


def quantization_error(features: Sequence[Tensor]) -> tuple[float, float]:
    """Return 1 - cos of features before and after uint8: the mean over the tokens and the largest."""
    errors = [
        1 - F.cosine_similarity(feature.double(), decode(encode(feature, "uint8")).double(), dim=1)
        for feature in features
    ]
    every = torch.cat([error[feature.norm(dim=1) > 0] for error, feature in zip(errors, features, strict=True)])
    return float(every.mean()), float(every.max())
