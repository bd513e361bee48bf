"""What of a sample is shown: its images, and the frames of its videos at times that follow from the index alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvit.batch import SampleRef
from cogvit.errors import DataError
from cogvit.model.config import VideoConfig
from cogvit.model.video import VideoReader, frame_times, time_text
from data_pipeline.decode import Encoded, Pixels
from data_pipeline.index import Index
from data_pipeline.shards import ShardReader

Ints = NDArray[np.int64]

STILL = -1  # the time of an image that is no frame


@dataclass(frozen=True, slots=True)
class Shown:
    """All images and frames of B samples, sample after sample, each in the order in which they are shown."""

    owner: Ints  # [E], which sample
    number: Ints  # [E], of the sample's files, as `Index.ref` takes it
    time_ms: Ints  # [E], of a frame; STILL of an image
    height_px: Ints  # [E]
    width_px: Ints  # [E]

    @property
    def place(self) -> Ints:
        """Among what is shown of the sample, [E]."""
        return np.arange(len(self.owner)) - np.searchsorted(self.owner, self.owner)


def shown_of(index: Index, rows: Ints, cfg: VideoConfig) -> Shown:
    """Return what is shown of some rows."""
    entries, further = index.take(rows), index.corpus.further_of(rows)
    first = np.flatnonzero(entries["height_px"] > 0)
    none = np.zeros(len(first), np.int64)
    owner, number = (np.concatenate([one, further[name]]) for one, name in ((first, "owner"), (none, "number")))
    order = np.lexsort((number, owner))
    columns = [owner, number]
    for name in ("height_px", "width_px"):
        columns.append(np.concatenate([entries[name][first].astype(np.int64), further[name]]))
    frames, last_ms = (np.concatenate([none, further[name]])[order] for name in ("frames", "last_ms"))
    count, times_ms = frame_times(frames, last_ms, cfg)
    is_video = frames > 0
    count[~is_video] = 1
    time_ms = np.full(count.sum(), STILL)
    time_ms[np.repeat(is_video, count)] = times_ms
    owner, number, height_px, width_px = (np.repeat(column[order], count) for column in columns)
    return Shown(owner, number, time_ms, height_px, width_px)


def frame_texts(more: NDArray[Any], cfg: VideoConfig) -> list[list[str]]:
    """Return for each video among corpus_form.MORE of a sample what stands before its frames."""
    videos = more[more["frames"] > 0]
    count, times_ms = frame_times(videos["frames"].astype(np.int64), videos["last_ms"].astype(np.int64), cfg)
    texts = iter([time_text(time_ms, cfg) for time_ms in times_ms.tolist()])
    return [[next(texts) for _ in range(own)] for own in count.tolist()]


class Film:
    """Some frames of a video, decoded together when the first one is asked for."""

    def __init__(self, data: bytes, times_ms: Sequence[int], reader: VideoReader) -> None:
        self._data, self._reader = data, reader
        self._times_ms = sorted(set(times_ms))
        self._frames: dict[tuple[int, int], dict[int, Pixels]] = {}  # by the least size: it decides the pixels
        self._refused = ""

    def frame(self, time_ms: int, at_least_hw_px: tuple[int, int]) -> Pixels:
        """Return a frame, not below a size. Errors: DataError when one of the frames does not decode."""
        if not self._refused and at_least_hw_px not in self._frames:
            try:
                found = self._reader.frames(self._data, self._times_ms, at_least_hw_px)
                self._frames[at_least_hw_px] = dict(zip(self._times_ms, found, strict=True))
            except DataError as error:
                self._refused = str(error)  # it might crash its reader as often as it has frames
        if self._refused:
            raise DataError(self._refused)
        return self._frames[at_least_hw_px][time_ms]


@dataclass(frozen=True, slots=True)
class Frame:
    """One of them."""

    film: Film
    time_ms: int

    def pixels(self, at_least_hw_px: tuple[int, int]) -> Pixels:
        """Return uint8 [H, W, 3], upright. Errors: DataError when it does not decode."""
        return self.film.frame(self.time_ms, at_least_hw_px)


def reading(
    refs: Sequence[SampleRef], time_ms: Ints, reader: ShardReader, videos: VideoReader
) -> Callable[[int], Encoded]:
    """Return what reads the n-th of some images and frames; of a video the bytes are read once.

    refs and time_ms: of each, as `Shown` has them.
    """
    times, films = time_ms.tolist(), dict[SampleRef, Film]()
    wanted: dict[SampleRef, list[int]] = {}
    for ref, one in zip(refs, times, strict=True):
        wanted.setdefault(ref, []).append(one)

    def encoded(number: int) -> Encoded:
        ref = refs[number]
        if ref not in films:
            data = reader.read(ref.shard, ref.offset_bytes, ref.size_bytes, ref.version)
            if times[number] == STILL:
                return data
            films[ref] = Film(data, wanted[ref], videos)
        return Frame(films[ref], times[number])

    return encoded
