"""One door for videos: a file becomes some of its frames, each with its time, for users and for training alike.

A video is read by a child process (`video_child.py`): FFmpeg crashes or hangs on some hostile files, and then it is the
child that is gone, and one video that is not read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvit.errors import ConfigError, DataError
from cogvit.model.config import VideoConfig

if TYPE_CHECKING:  # as in images.py
    from numpy.typing import NDArray
    from PIL.Image import Image

    from cogvit.model.images import Pixels

    Ints = NDArray[np.int64]

MAX_BYTES = 1 << 30  # of a file, which is held in memory while it is read
LIMIT_S = 60.0  # of CPU time, that reading a video may take; of time on the wall, so many times as much:
_WALL = 4.0
_USERS_LEAST_PX = 1024  # frames of a user's video are never halved below it
_CHILD = Path(__file__).with_name("video_child.py")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a video is, before anybody says which of its frames are shown."""

    height_px: int  # upright, as players show it
    width_px: int
    frames: int
    last_ms: int  # when the last one appears, after the first


def frame_times(frames: Ints, last_ms: Ints, cfg: VideoConfig) -> tuple[Ints, Ints]:
    """Return how many frames of V videos are shown, [V], and all their times in ms: each is what is on the screen then.

    Args:
        frames: [V] that each has.
        last_ms: [V] when the last one appears.
        cfg: which are shown.
    """
    span_ms = np.minimum(last_ms, round(1000 * cfg.first_s)) if cfg.first_s else last_ms
    every_ms = round(1000 * cfg.every_s)
    count = np.minimum(span_ms // every_ms + 1 if every_ms else frames, cfg.frames) * (frames > 0)
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    if every_ms:
        return count, place * every_ms
    gaps = np.repeat(np.maximum(count - 1, 1), count)
    return count, (2 * np.repeat(span_ms, count) * place + gaps) // (2 * gaps)


def time_text(time_ms: int, cfg: VideoConfig) -> str:
    """Return what stands before a frame, in seconds; nothing where times are not told."""
    tenths = (time_ms + 50) // 100
    return f"{tenths // 10}.{tenths % 10}s" if cfg.times else ""


class VideoReader:
    """Reads videos in child processes, as many as threads ask at once; they end with it. Threads may share it.

    Args:
        limit_s: CPU time that reading one video may take.

    Errors: ConfigError, by its methods, when PyAV is not installed or the process does not start.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def measure(self, data: bytes) -> Measured:
        """Read the times of a video's frames and decode the first one.

        Errors: DataError when it cannot be read; its message is a reason to count by.
        """
        said, _ = self._ask({"ask": "measure"}, data)
        return Measured(**said["measured"])

    def frames(self, data: bytes, times_ms: Sequence[int], at_least_hw_px: tuple[int, int]) -> list[Pixels]:
        """Return what is on the screen at some rising times, each uint8 [H, W, 3], turned upright.

        at_least_hw_px: frames may be halved, never below it. Errors: DataError when one of them does not decode.
        """
        asked = {"ask": "frames", "times_ms": list(times_ms), "at_least_hw_px": list(at_least_hw_px)}
        said, payload = self._ask(asked, data)
        bounds = np.cumsum([int(np.prod(shape)) for shape in said["shapes"]])
        pieces = np.split(np.frombuffer(bytearray(payload), np.uint8), bounds[:-1])
        found = [piece.reshape(shape) for piece, shape in zip(pieces, said["shapes"], strict=True)]
        return [found[place] for place in said["places"]]

    def close(self) -> None:
        """End the children that nobody waits for."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def __del__(self) -> None:
        for child in getattr(self, "_idle", []):
            child.end()

    def _ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        if len(data) > MAX_BYTES:
            raise DataError(f"a video of more than {MAX_BYTES:,} bytes")
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is not None and child.is_gone():
            child.end()
            child = None
        child = child or _Child()
        try:
            answer = child.ask(request, data, self._limit_s)
        except BaseException:
            child.end()
            raise
        with self._lock:
            self._idle.append(child)
        if "refused" in answer[0]:
            raise DataError(answer[0]["refused"])
        return answer


class _Child:
    """A process that reads videos. Errors: ConfigError when it does not start."""

    def __init__(self) -> None:
        if find_spec("av") is None:
            raise ConfigError("videos need PyAV, which is not installed: pip install 'cogvit[video]'")
        # Of its own session: a Ctrl-C is the parent's business, at whose end its input ends.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        if self._output.readline() != b"ready\n":
            self.end()
            raise ConfigError(f"the process that reads videos does not start; see what {_CHILD} says by itself")

    def ask(self, request: dict[str, Any], data: bytes, limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for the answer. Errors: DataError when the process dies or takes too long."""
        alarm = threading.Timer(_WALL * limit_s, self._process.kill)
        alarm.start()
        try:
            self._input.write(json.dumps({**request, "bytes": len(data), "cpu_s": limit_s}).encode() + b"\n")
            self._input.write(data)
            self._input.flush()
            said = json.loads(self._output.readline() or b"null")
            wanted = sum(int(np.prod(shape)) for shape in said.get("shapes", ())) if said else 0
            payload = self._output.read(wanted)
        except BrokenPipeError:
            said, payload, wanted = None, b"", 0
        finally:
            alarm.cancel()
        if said is None or len(payload) != wanted:
            raise DataError(f"it ends the process that reads it: {self._how(limit_s)}")
        return said, payload

    def is_gone(self) -> bool:
        """Whether it ended while nobody asked."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Make it end, and wait until it has."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # what it did not read any more
            self._input.close()
        self._output.close()

    def _how(self, limit_s: float) -> str:
        status = self._process.wait()
        slow = status in (-9, -24)  # SIGKILL by the alarm or for memory, SIGXCPU
        return f"more than {limit_s:g} s or too much memory" if slow else f"a crash of FFmpeg (status {status})"


def shown_parts(part: dict[str, Any], cfg: VideoConfig) -> Iterator[dict[str, Any]]:
    """Yield a part of a message, a video as frames with their times as text.

    Errors: DataError when it cannot be read, with its name.
    """
    if part["type"] != "video":
        yield part
        return
    name = os.fspath(part["video"])
    try:
        if os.path.getsize(name) > MAX_BYTES:
            raise DataError(f"a video of more than {MAX_BYTES:,} bytes")
        data = Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"the video {name} cannot be read: {error.strerror}") from None
    reader = VideoReader()
    try:
        measured = reader.measure(data)
        _, times_ms = frame_times(np.array([measured.frames]), np.array([measured.last_ms]), cfg)
        frames = reader.frames(data, times_ms.tolist(), (_USERS_LEAST_PX, _USERS_LEAST_PX))
    except DataError as error:
        raise DataError(f"the video {name} cannot be read: {error}") from None
    finally:
        reader.close()
    for time_ms, frame in zip(times_ms.tolist(), frames, strict=True):
        yield from ({"type": "text", "text": text} for text in [time_text(time_ms, cfg)] if text)
        yield {"type": "image", "image": _as_shown(frame, measured)}


def _as_shown(frame: Pixels, measured: Measured) -> Image | Pixels:
    """A frame as wide as players show it: as training resizes it."""
    height_px, width_px = frame.shape[:2]
    shown_px = round(height_px * measured.width_px / measured.height_px)
    if abs(shown_px - width_px) * 50 <= width_px:  # a frame that was halved has lost a row or a column
        return frame
    from PIL import Image as pillow

    return pillow.fromarray(frame).resize((shown_px, height_px), pillow.Resampling.BILINEAR)
