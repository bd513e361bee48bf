"""One file of a feature store, in the safetensors format, written and read image by image.

It holds `rows`, the features of the shard's images end to end, `low` and `span` [S, C] where those are bytes, and an
index of int64: `sample_id` and `checksum` [S], `start` [S + 1]. An image is encoded, summed and written while it is in
the processor's cache, and reading asks for its bytes alone: a memory map would fault page by page.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvit.errors import DataError
from cogvit.teacher.encoding import ROW_DTYPES, StoreDtype, decode, encode, fits

UNFINISHED = ".part"
COMMAND = "run python -m tools.precompute_features"
_CODES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_DIGEST_CHARACTERS = 64


class Memory:
    """Bytes that are used again and again: memory that is new for every image costs as much as reading it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return some, which what was taken before may lie in."""
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes]


@dataclass(frozen=True)
class Part:
    """Where a tensor [.., C] lies in a file."""

    offset_bytes: int
    dtype: torch.dtype
    dim: int  # C

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.dim * self.dtype.itemsize

    def read(self, file: BinaryIO, first: int, end: int, memory: Memory) -> Tensor:
        """Return some rows; what a file that was cut lacks is undefined, and the checksum tells."""
        found = memory.take((end - first) * self.row_bytes).view(self.dtype).view(end - first, self.dim)
        view, offset = _bytes(found), self.offset_bytes + first * self.row_bytes
        while len(view) and (count := os.preadv(file.fileno(), [view], offset)):
            view, offset = view[count:], offset + count
        return found


@dataclass(frozen=True)
class ShardFeatures:
    """One open file of the store."""

    path: Path
    file: BinaryIO
    parts: dict[str, Part]  # rows and, where those are bytes, low and span
    start: list[int]  # S + 1, first row of each sample
    checksum: list[int]  # S
    place: dict[int, int]  # sample id -> s
    memory: dict[str, Memory]  # what was read last, by part: one thread reads a file

    def expect(self, sample_id: int) -> None:
        """Have the system fetch an image's features, without waiting for them. Errors: DataError for no such image."""
        place, rows = self._place(sample_id), self.parts["rows"]
        first, end = (rows.offset_bytes + row * rows.row_bytes for row in self.start[place : place + 2])
        os.posix_fadvise(self.file.fileno(), first, end - first, os.POSIX_FADV_WILLNEED)

    def _place(self, sample_id: int) -> int:
        if sample_id not in self.place:
            raise DataError(f"{self.path} has no features of sample {sample_id}; remove it and {COMMAND}")
        return self.place[sample_id]

    def read(self, sample_id: int, chosen_n: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return all features of one image, or those that a mask chooses: [m, C] float32, in `out` if that is given.

        Errors: DataError when they are not what was written, cannot be read, or are of another grid than the mask.
        """
        place = self._place(sample_id)
        first, end = self.start[place : place + 2]
        if chosen_n is not None and len(chosen_n) != end - first:
            raise DataError(
                f"{self.path} has {end - first} features of sample {sample_id}, and the run's grid wants"
                f" {len(chosen_n)}; {COMMAND} with the run's sizes"
            )
        try:
            found = {
                name: part.read(self.file, *((first, end) if name == "rows" else (place, place + 1)), self.memory[name])
                for name, part in self.parts.items()
            }
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}; remove it and {COMMAND}") from error
        if _checksum(found) != self.checksum[place]:
            raise DataError(f"{self.path} is damaged (features of sample {sample_id}); remove it and {COMMAND}")
        if chosen_n is not None:
            found["rows"] = found["rows"].index_select(0, chosen_n.nonzero()[:, 0])
        return decode(found, out)


@contextmanager
def shard_writer(
    path: Path, header: Mapping[str, str], sample_ids: Sequence[int], num_rows: Sequence[int], dim: int
) -> Iterator[Callable[[Tensor], None]]:
    """Yield what takes the [n, C] features of one sample after the other, in the order of sample_ids.

    The file is in its place, whole, once the block has ended without an error, and otherwise not at all.
    Errors: DataError for features that are not finite, and, from the block or its end, when the disk does not take it.
    """
    dtype: StoreDtype = header["dtype"]  # type: ignore[assignment]
    count, start = len(sample_ids), np.cumsum([0, *num_rows]).tolist()
    scales = ("low", "span") if dtype == "uint8" else ()
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "sample_id": (torch.int64, (count,)),
        "start": (torch.int64, (count + 1,)),
        "checksum": (torch.int64, (count,)),
        **{name: (torch.float32, (count, dim)) for name in scales},
        "rows": (ROW_DTYPES[dtype], (start[-1], dim)),
    }
    small: dict[str, list[Tensor]] = {name: [] for name in scales}
    checksums: list[int] = []
    unfinished = path.with_name(path.name + UNFINISHED)
    head, offsets = _head({**header, "index": "0" * _DIGEST_CHARACTERS}, layout)
    try:
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = unfinished.open("wb", buffering=0)
            file.seek(len(head) + offsets["rows"])
        with file:

            def append(feature: Tensor) -> None:
                assert len(feature) == num_rows[len(checksums)], "a sample has as many rows as was said"
                if not fits(feature, dtype):
                    raise DataError(
                        f"the features of sample {sample_ids[len(checksums)]} for {path} are not finite in {dtype};"
                        " look at the teacher's weights, --teachers.precision and --dtype"
                    )
                parts = encode(feature, dtype)
                checksums.append(_checksum(parts))
                with _written(path):
                    _write(file, _bytes(parts["rows"]))
                for name in scales:
                    small[name].append(parts[name])

            yield append
            assert len(checksums) == count, "every sample has its features"
            columns = {"sample_id": sample_ids, "start": start, "checksum": checksums}
            index = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
            with _written(path):
                file.seek(0)
                _write(file, memoryview(_head({**header, "index": _digest(index)}, layout)[0]))
                for tensor in [*index.values(), *(torch.cat(small[name]) for name in scales)]:
                    _write(file, _bytes(tensor))
                os.fsync(file.fileno())
                unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_shard(path: Path, header: Mapping[str, str], sample_ids: Sequence[int], features: Sequence[Tensor]) -> None:
    """Write the features of a shard's samples, which are all there. Errors: as `shard_writer`."""
    with shard_writer(path, header, sample_ids, [len(x) for x in features], features[0].shape[1]) as append:
        for feature in features:
            append(feature)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Say what could not be written. Errors: DataError in place of the system's."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; make room and give the same command again") from error


def _write(file: BinaryIO, view: memoryview) -> None:
    while len(view):  # a disk that fills up takes a part of it first
        view = view[file.write(view) :]


def _head(
    metadata: Mapping[str, str], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, int]]:
    """Return what stands before the tensors in a safetensors file, and where each begins after it."""
    said: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name, (dtype, shape) in layout.items():
        offsets[name], end = end, end + int(np.prod(shape)) * dtype.itemsize
        said[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (offsets[name], end)}
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def open_shard(path: Path) -> tuple[ShardFeatures, dict[str, str]]:
    """Open a file of a store; returns what it holds and what it says of itself.

    Errors: DataError when it is cut, of an older format, or its index is not what was written.
    """
    try:
        with safe_open(path, "pt") as tensors:  # which also finds a file that was cut
            header: dict[str, str] = tensors.metadata() or {}
            index = {name: tensors.get_tensor(name) for name in ("sample_id", "start", "checksum")}
        file = path.open("rb", buffering=0)
        head_bytes = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        said = json.loads(os.pread(file.fileno(), head_bytes, 8))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and {COMMAND}") from error
    dtypes = [said[name]["dtype"] for name in ("rows", "low", "span") if name in said]
    if _digest(index) != header.pop("index", "") or "rows" not in said or not _DTYPES.keys() >= set(dtypes):
        raise DataError(f"{path} is damaged (its index); remove it and {COMMAND}")
    parts = {
        name: Part(8 + head_bytes + said[name]["data_offsets"][0], _DTYPES[said[name]["dtype"]], said[name]["shape"][1])
        for name in ("rows", "low", "span")
        if name in said
    }
    memory = {name: Memory() for name in parts}
    place = {sample_id: place for place, sample_id in enumerate(index["sample_id"].tolist())}
    return ShardFeatures(path, file, parts, index["start"].tolist(), index["checksum"].tolist(), place, memory), header


def _bytes(tensor: Tensor) -> memoryview:
    array: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return array.reshape(-1).data


def _checksum(parts: Mapping[str, Tensor]) -> int:
    """Return the XXH3 of an image's parts as an int64."""
    value = xxhash.xxh3_64()
    for name in sorted(parts):
        value.update(_bytes(parts[name]))
    return int.from_bytes(value.digest(), "big", signed=True)


def _digest(index: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(bytes(_bytes(index[name])) for name in sorted(index))).hexdigest()
