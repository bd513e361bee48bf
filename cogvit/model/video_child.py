"""Reads videos with PyAV in a process of its own, which `cogvit.model.video` starts: the one importer of PyAV.

What FFmpeg does with a hostile file, be it a crash, an endless loop or all of the memory, it does here. The process is
started by this file's path and imports neither torch nor anything of ours, so it is there in a fifth of a second. It
answers one request after the other until its input ends.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # playlists and their like would open other files
MAX_FRAME_PIXELS = 1 << 26  # beyond 8K
MAX_DECODED_PIXELS = 1 << 34  # of all frames that one request decodes: 8,000 of 1080p
MAX_PACKETS = 1 << 20  # ten hours of 30 frames a second
MAX_MEMORY_BYTES = 6 << 30
PROBED_BYTES = 1 << 22
TOLERANCE_MS = 5  # formats round the time of a frame to a millisecond, and a time between frames is rounded too
_MOST_HALVINGS = 5
Pixels = NDArray[np.uint8]


class RefusedError(Exception):
    """A video that is not read; the message is a reason to count by."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video appear, as its packets say, in order."""

    ms: list[int]  # from the first frame on
    stamps: list[int]  # the same in the stream's unit
    key_stamps: list[int]  # of frames that need no other one

    def shown_at(self, time_ms: int) -> int:
        """Return the stamp of the frame that is on the screen at a time."""
        return self.stamps[max(bisect_right(self.ms, time_ms + TOLERANCE_MS) - 1, 0)]

    def key_before(self, stamp: int) -> int:
        """Return the stamp from which to decode."""
        return self.key_stamps[max(bisect_right(self.key_stamps, stamp) - 1, 0)]


def open_video(data: bytes) -> tuple[InputContainer, VideoStream]:
    """Open a file in memory and choose its first moving picture."""
    options = {
        "format_whitelist": FORMATS,
        "protocol_whitelist": "none",
        "max_pixels": str(MAX_FRAME_PIXELS),
        "probesize": str(PROBED_BYTES),
    }
    try:
        container = av.open(io.BytesIO(data), "r", options=options)
    except av.error.FFmpegError:
        raise RefusedError("no known video format, or a damaged header") from None
    streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise RefusedError("a video without a moving picture" + (", sound alone" if container.streams.audio else ""))
    stream = streams[0]
    if stream.codec_context is None:
        raise RefusedError("a video of a codec that is not known")
    check_size(stream.codec_context.height, stream.codec_context.width)
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # the other cores are the ranks'
    return container, stream


def check_size(height_px: int, width_px: int) -> None:
    """Refuse a frame without pixels or with too many."""
    if min(height_px, width_px) < 1:
        raise RefusedError("a video whose frames have no size, or too large a one")
    if height_px * width_px > MAX_FRAME_PIXELS:
        raise RefusedError(f"a video with frames of more than {MAX_FRAME_PIXELS:,} pixels")


def timeline_of(container: InputContainer, stream: VideoStream) -> Timeline:
    """Read the times of all packets; nothing is decoded."""
    found: list[tuple[int, bool]] = []
    try:
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or packet.size == 0 or packet.is_corrupt or packet.is_discard:
                continue
            found.append((stamp, packet.is_keyframe))
            if len(found) > MAX_PACKETS:
                raise RefusedError(f"a video of more than {MAX_PACKETS:,} frames")
    except av.error.FFmpegError:  # what came before its damage counts
        found = found[:-1]
    found.sort()
    if not found:
        raise RefusedError("a video without frames")
    unit_s = Fraction(stream.time_base or Fraction(1, 1000))
    stamps = [stamp for stamp, _ in found]
    ms = [round(1000 * (stamp - stamps[0]) * unit_s) for stamp in stamps]
    if ms[-1] >= 1 << 32:
        raise RefusedError("a video of more than 49 days")
    keys = [stamp for stamp, is_key in found if is_key] or stamps[:1]
    return Timeline(ms, stamps, keys)


def decoded(
    container: InputContainer, stream: VideoStream, timeline: Timeline, stamp: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield frames with their stamps, in the order of these, from the last one on that is decodable before a stamp.

    An AVI numbers packets as they lie, which is not the order in which frames are shown: there it is the n-th that
    appears at the n-th time.
    """
    container.seek(timeline.key_before(stamp), stream=stream, backward=True)
    place = None
    for frame in container.decode(stream):
        check_size(frame.height, frame.width)
        own = frame.dts if frame.pts is None else frame.pts
        if own is None or frame.is_corrupt:
            continue
        if container.format.name == "avi":
            place = bisect_left(timeline.stamps, own) if place is None else place + 1
            own = timeline.stamps[min(place, len(timeline.stamps) - 1)]
        yield own, frame


def measure(data: bytes) -> dict[str, int]:
    """Return the upright size of a video's first frame, the number of frames and when the last one appears."""
    container, stream = open_video(data)
    with container:
        timeline = timeline_of(container, stream)
        try:
            frame = next((frame for _, frame in decoded(container, stream, timeline, timeline.stamps[0])), None)
        except av.error.FFmpegError:
            frame = None
        if frame is None:
            raise RefusedError("a video without a frame that decodes")
        height_px, width_px = shown_size(frame, stream)
        return {
            "height_px": height_px,
            "width_px": width_px,
            "frames": len(timeline.stamps),
            "last_ms": timeline.ms[-1],
        }


def shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Return height and width as players show a frame: its pixels need not be square, and it may lie on its side."""
    aspect = stream.sample_aspect_ratio
    stretch = float(aspect) if aspect and 0.25 <= aspect <= 4 else 1.0
    height_px, width_px = frame.height, max(1, round(frame.width * stretch))
    return (width_px, height_px) if quarter_turns(frame) % 2 else (height_px, width_px)


def quarter_turns(frame: VideoFrame) -> int:
    """Return by how many quarters a frame is turned counterclockwise to be upright."""
    return round(frame.rotation / 90) % 4


def frames_at(data: bytes, times_ms: list[int], at_least_hw_px: tuple[int, int]) -> tuple[list[Pixels], list[int]]:
    """Return the frames that are on the screen at some rising times, and for each time the number of its frame.

    A frame far above a size is halved, never below it.
    """
    container, stream = open_video(data)
    with container:
        timeline = timeline_of(container, stream)
        wanted = [timeline.shown_at(time_ms) for time_ms in times_ms]
        frames: list[Pixels] = []
        number: dict[int, int] = {}
        place, left_pixels = None, MAX_DECODED_PIXELS
        source: Iterator[tuple[int, VideoFrame]] = iter(())
        for stamp in sorted(set(wanted)):
            if place is None or timeline.key_before(stamp) > place:
                source = decoded(container, stream, timeline, stamp)
            chosen = None
            for place, frame in source:
                left_pixels -= frame.height * frame.width
                if left_pixels < 0:
                    raise RefusedError(f"more than {MAX_DECODED_PIXELS:,} pixels to decode for its frames")
                if place >= stamp:
                    chosen = frame
                    break
            if chosen is None or place != stamp:
                raise RefusedError("a frame that its file lists does not decode")
            number[stamp] = len(frames)
            frames.append(pixels_of(chosen, at_least_hw_px))
        return frames, [number[stamp] for stamp in wanted]


def pixels_of(frame: VideoFrame, at_least_hw_px: tuple[int, int]) -> Pixels:
    """Return uint8 [H, W, 3], upright."""
    turns = quarter_turns(frame)
    least_height, least_width = at_least_hw_px[::-1] if turns % 2 else at_least_hw_px
    halved = next(
        k for k in range(_MOST_HALVINGS, -1, -1) if not k or ((frame.height >> k, frame.width >> k) >= (1, 1)
        and frame.height >> k >= least_height and frame.width >> k >= least_width)
    )  # fmt: skip
    if halved:
        frame = frame.reformat(frame.width >> halved, frame.height >> halved, "rgb24", interpolation="AREA")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[Pixels]]:
    """Do what a request asks for; a video that cannot be read is an answer too."""
    try:
        if request["ask"] == "measure":
            return {"measured": measure(data)}, []
        height_px, width_px = request["at_least_hw_px"]
        frames, places = frames_at(data, request["times_ms"], (height_px, width_px))
        return {"shapes": [frame.shape for frame in frames], "places": places}, frames
    except RefusedError as error:
        return {"refused": str(error)}, []
    except (av.error.FFmpegError, MemoryError, ValueError, OverflowError) as error:
        return {"refused": f"does not decode ({type(error).__name__})"}, []


def limit(cpu_s: float) -> None:
    """Let the system end this process when the request takes longer than that."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + cpu_s) + 1, resource.RLIM_INFINITY))


def main() -> None:
    """Answer requests: a line of JSON, then the file's bytes; the answer is a line of JSON, then the frames' bytes."""
    av.logging.set_level(None)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    while line := requests.readline():
        request = json.loads(line)
        limit(request["cpu_s"])
        said, frames = answer(request, requests.read(request["bytes"]))
        answers.write(json.dumps(said).encode() + b"\n")
        for frame in frames:
            answers.write(frame.data)
        answers.flush()


if __name__ == "__main__":
    main()
