"""From teachers to batches: what is asked, who answers, and how the answers join the stream of batches.

A FeatureSource answers requests; there is one in this process (LocalFeatures), one behind Ray (actors.py) and one on
disk (store.py), and all give the same bits for the same request. Shared and standardize.Standardized wrap any of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cogvit.batch import Batch, SampleRef, StepBatch, TeacherTargets
from cogvit.config import SUMMARY
from cogvit.errors import CogViTError
from cogvit.objective.masking import mask_image

Grid = tuple[int, int]  # rows, columns, in patches
Pixels = NDArray[np.uint8]  # [H, W, 3]
Item = TypeVar("Item")
Features = dict[str, Tensor]  # teacher name -> [M, C] float32, or with SUMMARY behind it: one row an image present

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
        """Return [rows, C] for each image: its summary where `parts` has one, then its patches."""


def request_of(batch: Batch, mask_ratio: float, *, augmented: bool = True) -> FeatureRequest:
    """Ask for the targets of one microbatch."""
    images = batch.images
    grids = tuple((int(rows), int(columns)) for rows, columns in images.grid_hw.tolist())
    return FeatureRequest(batch.samples, grids, tuple(images.key.tolist()), mask_ratio, augmented)


def is_summary(name: str) -> bool:
    """Whether features of this name are one row an image instead of one a patch."""
    return name.endswith(SUMMARY)


def rows_asked(name: str, request: FeatureRequest, slot: int) -> Tensor:
    """Return which rows of an image's features a request asks for, bool: its masked patches, or its one summary."""
    rows, columns = request.grids[slot]
    if is_summary(name):
        return torch.ones(1, dtype=torch.bool)
    return mask_image(request.keys[slot], rows * columns, request.mask_ratio)


def rows_of_images(name: str, request: FeatureRequest) -> list[int]:
    """Return how many rows each image has in an answer of this name."""
    present = [slot for slot, sample in enumerate(request.samples) if sample is not None]
    return [int(rows_asked(name, request, slot).sum()) for slot in present]


def answer_bytes(request: FeatureRequest, dims: Mapping[str, int], precision: str) -> int:
    """Return the size of an answer before it is made; dims has the channels of what is asked, by name."""
    value_bytes = 2 if precision == "bf16" else 4
    return sum(sum(rows_of_images(name, request)) * dim * value_bytes for name, dim in dims.items())


def answer(name: str, teacher: PatchTeacher, request: FeatureRequest, decode: DecodeImage) -> Features:
    """Answer a request with one teacher, in the teacher's precision.

    The rows of an image that does not decode are zeros, so that the order of the others stands.
    """
    images = {
        slot: decode(sample, request.keys[slot] if request.augmented else None, teacher.input_px(request.grids[slot]))
        for slot, sample in enumerate(request.samples)
        if sample is not None
    }
    readable = {slot: image for slot, image in images.items() if image is not None}
    found = teacher.features(list(readable.values()), [request.grids[slot] for slot in readable])
    by_slot = dict(zip(readable, found, strict=True))
    chosen: dict[str, list[Tensor]] = {name + part: [] for part in teacher.parts}
    for slot in images:
        for own, rows in chosen.items():
            asked = rows_asked(own, request, slot)
            if slot in by_slot:
                feature = by_slot[slot]
                rows.append(feature[:1] if is_summary(own) else feature[-len(asked) :][asked])
            else:
                rows.append(torch.zeros(int(asked.sum()), teacher.dim, dtype=teacher.dtype))
    nothing = torch.zeros(0, teacher.dim, dtype=teacher.dtype)
    return {own: torch.cat([nothing, *rows]) for own, rows in chosen.items()}


@dataclass(frozen=True)
class LocalFeatures:
    """Teachers in this process, for evaluation, tools and tests."""

    teachers: Mapping[str, PatchTeacher]
    decode: DecodeImage

    @property
    def dims(self) -> Mapping[str, int]:
        """C of each teacher's features, by name."""
        return {name + part: teacher.dim for name, teacher in self.teachers.items() for part in teacher.parts}

    def submit(self, request: FeatureRequest) -> FeatureRequest:
        """Keep the request; the work is done when the result is asked for."""
        return request

    def result(self, handle: FeatureRequest) -> Features:
        """Compute the features."""
        answers = [answer(name, teacher, handle, self.decode) for name, teacher in self.teachers.items()]
        return {name: features.float() for found in answers for name, features in found.items()}


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
                torch.full((int(rows_asked(name, request, slot).sum()),), there)
                for slot, there in enumerate(handle.in_first)
                if request.samples[slot] is not None
            ]
            in_first_M = torch.cat([torch.zeros(0, dtype=torch.bool), *own])
            features[name] = torch.empty(len(in_first_M), dim)
            features[name][in_first_M], features[name][~in_first_M] = first[name], second[name]
        return features


@dataclass(frozen=True)
class Shared:
    """One rank of a group asks and all of them receive: the ranks of a group train on the same packs.

    `source` is None on every rank but the leader. An error of the leader is raised on all of them, so that none waits
    for a peer that has left. A rank that trains on no features has no group and gets none.
    """

    source: FeatureSource | None
    dims: Mapping[str, int]
    group: dist.ProcessGroup | None
    leader: int  # rank inside the group
    device: torch.device  # where the group's backend communicates

    def submit(self, request: FeatureRequest) -> Any:
        """Ask the source, on the leader."""
        return None if self.source is None else self.source.submit(request)

    def result(self, handle: Any) -> Features:
        """Broadcast what the leader's source answers. Collective: every rank of the group calls it."""
        features: Features = {}
        if self.group is None:
            return features
        header: list[Any] = [None]
        if self.source is not None:
            try:
                features = self.source.result(handle)
                header[0] = {name: tuple(tensor.shape) for name, tensor in features.items()}
            except CogViTError as error:
                header[0] = error
        dist.broadcast_object_list(header, group=self.group, group_src=self.leader, device=self.device)
        if isinstance(header[0], CogViTError):
            raise header[0]
        for name, shape in header[0].items():
            if self.source is None:
                features[name] = torch.empty(shape, device=self.device)
            features[name] = features[name].to(self.device)
            dist.broadcast(features[name], group=self.group, group_src=self.leader)
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
