"""Features computed once and read from disk: DIR/TEACHER/SHARD.CONTENTS.safetensors, one file a data shard and teacher.

A file holds the features of every token of the shard's images end to end, before standardization; one of
TEACHER_summary holds one feature an image. DIR/TEACHER/manifest.json says whose they are: the teacher's fingerprint,
precision and width, and how they are encoded. A file repeats it in its header, with the contents: a hash of the images'
ids, bytes and grids, which is in its name too, so that shards of one name, of training and held-out sets say, lie side
by side. Every image has a checksum.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvit.batch import SampleRef
from cogvit.errors import ConfigError
from cogvit.teacher.encoding import StoreDtype
from cogvit.teacher.shard import COMMAND, UNFINISHED, ShardFeatures, open_shard
from cogvit.teacher.stream import FeatureRequest, Features, is_summary, rows_asked, rows_of_images

Ints = NDArray[np.int64]

_VERSION = "4"
_OPEN_FILES = 128


@dataclass(frozen=True)
class Maker:
    """Who computed the features of a teacher, and how."""

    fingerprint: str
    precision: str
    dim: int  # C


def contents_of(sample_id: Ints, content_hash: Ints, grid_hw: Ints) -> str:
    """Return a hash of the ids, bytes and grids of a shard's images; grid_hw is [S, 2]."""
    return hashlib.sha256(np.column_stack([sample_id, content_hash, grid_hw]).astype("<i8").tobytes()).hexdigest()


def path_of(directory: Path, teacher: str, shard: str, contents: str) -> Path:
    """Return where the features of a shard lie."""
    return directory / teacher / f"{shard.rpartition('/')[2]}.{contents[:12]}.safetensors"


def header_of(maker: Maker, dtype: StoreDtype, contents: str) -> dict[str, str]:
    """Return what the file of a shard must say of itself."""
    return _manifest(maker, dtype) | {"contents": contents}


def dtype_of(name: str, dtype: StoreDtype) -> StoreDtype:
    """Return how the features of a name lie in a store of a dtype: bytes of one row would have a scale for each."""
    return "fp32" if dtype == "uint8" and is_summary(name) else dtype


def is_complete(path: Path, header: Mapping[str, str]) -> bool:
    """Whether a file is there, has its full length, and says what it must."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            return {name: value for name, value in said.items() if name != "index"} == header
    except (OSError, SafetensorError):
        return False


@contextmanager
def writing(directory: Path, makers: Mapping[str, Maker], dtype: StoreDtype) -> Iterator[None]:
    """Hold a store for writing, beside other jobs, with its manifests in place.

    What interrupted jobs left is removed where no other job writes.
    Errors: ConfigError when it is another teacher's or cannot be written.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((directory / "lock").open("w"))
            alone = _locked(lock)
            with (directory / "lock.manifests").open("w") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                for name, maker in makers.items():
                    _claim(directory / name, _manifest(maker, dtype_of(name, dtype)), alone=alone)
            fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the store {directory}: {error}; make room or choose another --out"
            ) from error
        yield


@contextmanager
def claimed(directory: Path, shard: str, contents: str) -> Iterator[bool]:
    """Hold a shard of a store, for its writer alone; yields whether it is ours and not another job's."""
    path = path_of(directory, "", shard, contents).with_suffix(".lock")
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        # Who had it before may have removed the file that was opened, and another made one of its name.
        ours = _locked(lock) and path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claim(directory: Path, manifest: dict[str, str], *, alone: bool) -> None:
    path = directory / "manifest.json"
    if path.exists():
        _refuse_other(path, manifest, "choose another --out")
    else:
        directory.mkdir(exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.replace(path)
    for left in directory.glob(f"*{UNFINISHED}") if alone else ():
        left.unlink()


def _manifest(maker: Maker, dtype: str) -> dict[str, str]:
    return {"version": _VERSION, "dtype": dtype} | {name: str(value) for name, value in asdict(maker).items()}


def read_manifest(path: Path, way_out: str) -> dict[str, str]:
    """Return what a manifest says. Errors: ConfigError when it is gone or none."""
    try:
        said = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"the store has no {path}; {COMMAND}") from None
    except (OSError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is no manifest of a feature store; {way_out}")
    return said


def _refuse_other(path: Path, expected: Mapping[str, str], way_out: str) -> None:
    """Compare a manifest with what is expected of it. Errors: ConfigError names the first field that differs."""
    said = read_manifest(path, way_out)
    for name, value in expected.items():
        if said.get(name) != value:
            raise ConfigError(
                f"{path.parent} was made with {name} {str(said.get(name))[:12]}, this run's is {value[:12]}; {way_out}"
            )


class StoreFeatures:
    """A store as a FeatureSource, for the shards whose contents it is given and the teachers that the run expects.

    contents: of the shards of each set, by path. A large one is never read as a whole but to look for every shard.
    Errors: ConfigError when the store is of other teachers, precision or widths.
    """

    def __init__(self, directory: Path, makers: Mapping[str, Maker], *contents: Mapping[str, str]) -> None:
        self._directory, self._makers, self._sets = directory, makers, contents
        for name, maker in makers.items():
            expected = {field: value for field, value in _manifest(maker, "").items() if field != "dtype"}
            _refuse_other(directory / name / "manifest.json", expected, "pass another --teachers.store")
        said = {name: read_manifest(directory / name / "manifest.json", COMMAND) for name in makers}
        self._dtypes = {
            name: torch.bfloat16 if one.get("dtype") == "bf16" else torch.float32 for name, one in said.items()
        }
        self._open = lru_cache(_OPEN_FILES)(self._open_file)
        self._has = lru_cache(maxsize=None)(self._has_shard)
        # One thread, in the order of the requests; it waits for the disk and adds checksums while the step computes.
        self._reader = ThreadPoolExecutor(1, "store")
        # Another one has the system fetch what the requests after it ask for: the disk is never idle.
        self._announcer = ThreadPoolExecutor(1, "store-ahead")

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher, by name."""
        return {name: maker.dim for name, maker in self._makers.items()}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Bf16 where it is stored so, else float32."""
        return self._dtypes

    def has(self, sample: SampleRef) -> bool:
        """Whether there are features of an image by every teacher."""
        return self._has(sample.shard)

    def require_all(self) -> None:
        """Look for the features of every shard, so that a run does not find out in its middle what is lacking.

        Lists each teacher's directory once, whatever the number of shards.

        Errors: ConfigError when a shard has none.
        """
        listed = {name: set(os.listdir(self._directory / name)) for name in self._makers}
        lacking = [
            shard
            for one in self._sets
            for shard, contents in one.items()
            if not all(path_of(self._directory, name, shard, contents).name in listed[name] for name in self._makers)
        ]
        if lacking:
            raise ConfigError(
                f"the store {self._directory} lacks {len(lacking)} of {sum(map(len, self._sets))} shards, or has them"
                f" for other images or grids ({lacking[0]} first); {COMMAND}, or pass --teachers.source"
                " store_then_online"
            )

    def submit(self, request: FeatureRequest) -> Future[Features]:
        """Have the features read."""
        self._announcer.submit(self._announce, request)
        return self._reader.submit(self._answer, request)

    def result(self, handle: Future[Features]) -> Features:
        """Wait for the features.

        Errors: ConfigError when a shard has no file or its file is of another teacher, precision or set of images;
        DataError when a file is damaged.
        """
        return handle.result()

    def _contents(self, shard: str) -> str:
        for one in self._sets:
            if (found := one.get(shard)) is not None:
                return found
        raise KeyError(shard)

    def _announce(self, request: FeatureRequest) -> None:
        """Tell the system of a request; what is wrong with it, its answer says."""
        for name in self._makers:
            for sample in request.samples:
                if sample is not None:
                    self._open(name, sample.shard).expect(sample.sample_id)

    def _answer(self, request: FeatureRequest) -> Features:
        return {name: self._read(name, request) for name in self._makers}

    def _read(self, name: str, request: FeatureRequest) -> Tensor:
        present = ((slot, sample) for slot, sample in enumerate(request.samples) if sample is not None)
        asked = [(sample, rows_asked(name, request, slot)) for slot, sample in present]
        sizes = rows_of_images(name, request)
        features = torch.empty(sum(sizes), self._makers[name].dim, dtype=self._dtypes[name])
        for (sample, chosen_n), out in zip(asked, features.split(sizes), strict=True):
            self._open(name, sample.shard).read(sample.sample_id, chosen_n, out)
        return features

    def _has_shard(self, shard: str) -> bool:
        return all(path_of(self._directory, name, shard, self._contents(shard)).exists() for name in self._makers)

    def _open_file(self, name: str, shard: str) -> ShardFeatures:
        contents = self._contents(shard)
        path = path_of(self._directory, name, shard, contents)
        if not path.exists():
            raise ConfigError(f"the store has no {path} for the images and grids of {shard}; {COMMAND}")
        features, said = open_shard(path)
        expected = _manifest(self._makers[name], said.get("dtype", "")) | {"contents": contents}
        wrong = [field for field in expected.keys() | said.keys() if said.get(field) != expected.get(field)]
        if wrong:
            raise ConfigError(f"{path} was made with other {', '.join(sorted(wrong))} than this run's; {COMMAND}")
        return features
