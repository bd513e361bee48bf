"""From teachers to batches: what is asked, who answers, and how the answers join the stream of batches.

A FeatureSource answers requests; there is one in this process (LocalFeatures), one behind Ray (actors.py) and one on
disk (store.py), and all give the same values for the same request. targets.Targets brings them to the ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import Batch, SampleRef, StepBatch, TeacherTargets
from cogvit.config import SUMMARY
from cogvit.objective.masking import mask_image, num_masked

Grid = tuple[int, int]  # rows, columns, in patches
Pixels = NDArray[np.uint8]  # [H, W, 3]
Item = TypeVar("Item")
Features = dict[str, Tensor]  # teacher name -> [M, C] float, or with SUMMARY behind it: one row an image present

# (sample, key, (height, width) in pixels) -> the image at that size, or None when its bytes do not decode. The key
# seeds augmentation that the student sees too; without one the image is as it is. It runs inside the actors, so it must
# be importable there.
DecodeImage = Callable[[SampleRef, int | None, tuple[int, int]], Pixels | None]


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """One forward batch of the teachers: the images of one pack, in slot order."""

    samples: tuple[SampleRef | None, ...]
    grids: tuple[Grid, ...]  # the student's
    keys: tuple[int, ...]  # seeds of the masks
    mask_ratio: float  # 1.0 asks for every token
    augmented: bool = True  # False: of the images as they are, though the run augments (its held-out ones)


class FeatureSource(Protocol):
    """Answers requests; `submit` returns at once, and `result` takes what `submit` returned."""

    @property
    def dims(self) -> Mapping[str, int]:
        """C of what it answers with, by name."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Of what it answers with, by name."""

    def submit(self, request: FeatureRequest) -> Any:
        """Begin to answer a request."""

    def result(self, handle: Any) -> Features:
        """Wait for the features of masked tokens or summaries, all images of the request end to end.

        Errors: TeacherUnavailable when they do not come in time.
        """


class PatchTeacher(Protocol):
    """What a teacher must be able to do; zoo.Teacher does."""

    @property
    def dim(self) -> int:
        """C, channels of a feature."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its features."""

    @property
    def parts(self) -> Sequence[str]:
        """What it gives: "" for its patches, SUMMARY for one feature of the whole image, in this order."""

    def input_px(self, grid: Grid) -> tuple[int, int]:
        """Return the (height, width) at which it wants an image of a student's grid."""

    def features(self, images: Sequence[Pixels], grids: Sequence[Grid]) -> list[Tensor]:
        """Return [rows, C] for each image, on one device: its summary where `parts` has one, then its patches."""


def request_of(batch: Batch, mask_ratio: float, *, augmented: bool = True) -> FeatureRequest:
    """Ask for the targets of one microbatch, which is on the host."""
    return FeatureRequest(batch.samples, grids_of(batch), tuple(batch.images.key.tolist()), mask_ratio, augmented)


def grids_of(batch: Batch) -> tuple[Grid, ...]:
    """Return the grid of every slot."""
    if batch.images.host is not None:
        return batch.images.host.grids
    return tuple((int(rows), int(columns)) for rows, columns in batch.images.grid_hw.tolist())


def is_summary(name: str) -> bool:
    """Whether features of this name are one row an image instead of one a patch."""
    return name.endswith(SUMMARY)


def rows_asked(name: str, request: FeatureRequest, slot: int) -> Tensor:
    """Return which rows of an image's features a request asks for, bool: its masked patches, or its one summary."""
    rows, columns = request.grids[slot]
    if is_summary(name):
        return torch.ones(1, dtype=torch.bool)
    return mask_image(request.keys[slot], rows * columns, request.mask_ratio)


def count_rows(name: str, grid: Grid, mask_ratio: float) -> int:
    """Return how many rows of an image's features a request asks for, without drawing its mask."""
    return 1 if is_summary(name) else num_masked(grid[0] * grid[1], mask_ratio)


def rows_of_images(name: str, request: FeatureRequest) -> list[int]:
    """Return how many rows each image has in an answer of this name."""
    pairs = zip(request.samples, request.grids, strict=True)
    return [count_rows(name, grid, request.mask_ratio) for sample, grid in pairs if sample is not None]


def answer_bytes(request: FeatureRequest, dims: Mapping[str, int], precision: str) -> int:
    """Return the size of an answer before it is made; dims has the channels of what is asked, by name."""
    value_bytes = 2 if precision == "bf16" else 4
    return sum(sum(rows_of_images(name, request)) * dim * value_bytes for name, dim in dims.items())


Images = dict[int, Pixels | None]  # by slot; None where the bytes do not decode


def decoded(
    teacher: PatchTeacher, request: FeatureRequest, decode: DecodeImage, threads: Executor | None = None
) -> Images:
    """Decode the images of a request as a teacher wants them, with threads where there are any."""

    def image_at(slot: int) -> Pixels | None:
        sample = request.samples[slot]
        assert sample is not None
        key = request.keys[slot] if request.augmented else None
        return decode(sample, key, teacher.input_px(request.grids[slot]))

    present = [slot for slot, sample in enumerate(request.samples) if sample is not None]
    return dict(
        zip(present, map(image_at, present) if threads is None else threads.map(image_at, present), strict=True)
    )


def answer(name: str, teacher: PatchTeacher, request: FeatureRequest, images: Images) -> Features:
    """Answer a request with one teacher, in the teacher's precision.

    The rows that are asked for are chosen where the teacher is, and leave its device at once. Those of an image that
    does not decode are zeros, so that the order of the others stands.
    """
    readable = {slot: image for slot, image in images.items() if image is not None}
    found = teacher.features(list(readable.values()), [request.grids[slot] for slot in readable])
    firsts = dict(zip(readable, accumulate(map(len, found), initial=0), strict=False))
    lengths = dict(zip(readable, map(len, found), strict=True))
    blank = sum(lengths.values())  # the row behind all of them is 0
    wanted: list[Tensor] = []
    for own in (name + part for part in teacher.parts):
        for slot in images:
            asked = rows_asked(own, request, slot)
            if slot not in firsts:
                wanted.append(torch.full((int(asked.sum()),), blank))
            else:
                skipped = 0 if is_summary(own) else lengths[slot] - len(asked)
                wanted.append(firsts[slot] + skipped + asked.nonzero().squeeze(1))
    if not found:
        found = [torch.zeros(0, teacher.dim, dtype=teacher.dtype)]
    rows = torch.cat([*found, found[0].new_zeros(1, teacher.dim)])
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *wanted])
    chosen = rows[index.to(rows.device)].cpu()
    counts = [sum(rows_of_images(name + part, request)) for part in teacher.parts]
    return {name + part: x for part, x in zip(teacher.parts, chosen.split(counts), strict=True)}


@dataclass(frozen=True)
class LocalFeatures:
    """Teachers in this process, for evaluation, tools and tests."""

    teachers: Mapping[str, PatchTeacher]
    decode: DecodeImage

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher's features, by name."""
        return {name + part: teacher.dim for name, teacher in self.teachers.items() for part in teacher.parts}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The teachers' own."""
        return {name + part: teacher.dtype for name, teacher in self.teachers.items() for part in teacher.parts}

    def submit(self, request: FeatureRequest) -> FeatureRequest:
        """Keep the request; the work is done when the result is asked for."""
        return request

    def result(self, handle: FeatureRequest) -> Features:
        """Compute the features."""
        features: Features = {}
        for name, teacher in self.teachers.items():
            features |= answer(name, teacher, handle, decoded(teacher, handle, self.decode))
        return features


class PartialSource(FeatureSource, Protocol):
    """A source that has an answer for some images; store.StoreFeatures is one."""

    def has(self, sample: SampleRef) -> bool:
        """Whether it can answer for an image."""


@dataclass(frozen=True, slots=True)
class Split:
    """A request under way at two sources."""

    request: FeatureRequest
    in_first: tuple[bool, ...]  # by slot
    first: Any  # handles
    second: Any


@dataclass(frozen=True)
class FirstThen:
    """What the first source has comes from it, image by image, and the rest from the second."""

    first: PartialSource
    second: FeatureSource

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher, by name."""
        return self.first.dims

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Of both where they agree, else the wider."""
        return {name: torch.promote_types(dtype, self.second.dtypes[name]) for name, dtype in self.first.dtypes.items()}

    def submit(self, request: FeatureRequest) -> Split:
        """Ask each source for its images."""
        in_first = tuple(sample is not None and self.first.has(sample) for sample in request.samples)
        pairs = list(zip(request.samples, in_first, strict=True))
        first = replace(request, samples=tuple(sample if there else None for sample, there in pairs))
        second = replace(request, samples=tuple(None if there else sample for sample, there in pairs))
        return Split(request, in_first, self.first.submit(first), self.second.submit(second))

    def result(self, handle: Split) -> Features:
        """Put the answers together in the order of the slots."""
        request, first, second = handle.request, self.first.result(handle.first), self.second.result(handle.second)
        features = {}
        for name, dim in self.dims.items():
            own = [
                torch.full((count_rows(name, request.grids[slot], request.mask_ratio),), there)
                for slot, there in enumerate(handle.in_first)
                if request.samples[slot] is not None
            ]
            in_first_M, dtype = torch.cat([torch.zeros(0, dtype=torch.bool), *own]), self.dtypes[name]
            features[name] = torch.empty(len(in_first_M), dim, dtype=dtype)
            features[name][in_first_M], features[name][~in_first_M] = first[name].to(dtype), second[name].to(dtype)
        return features


def attach_targets(
    batches: Iterable[StepBatch],
    source: FeatureSource,
    *,
    mask_ratio: float,
    in_flight_steps: int,
    augmented: bool = True,
) -> Iterator[StepBatch]:
    """Yield the same batches in the same order with their targets, keeping in_flight_steps of requests ahead.

    Errors: TeacherUnavailable as FeatureSource.result.
    """

    def submit(step: StepBatch) -> list[Any]:
        return [source.submit(request_of(batch, mask_ratio, augmented=augmented)) for batch in step.micro]

    for step, handles in submit_ahead(batches, submit, in_flight_steps):
        micro = tuple(
            replace(batch, targets=TeacherTargets(source.result(handle)))
            for batch, handle in zip(step.micro, handles, strict=True)
        )
        yield replace(step, micro=micro)


def submit_ahead(items: Iterable[Item], submit: Callable[[Item], Any], in_flight: int) -> Iterator[tuple[Item, Any]]:
    """Yield (item, what submit returned for it) in order, with up to in_flight later items submitted already."""
    waiting: deque[tuple[Item, Any]] = deque()
    for item in items:
        waiting.append((item, submit(item)))
        if len(waiting) > in_flight:
            yield waiting.popleft()
    yield from waiting
