"""Small videos for tests, written with PyAV: drawn frames, in any container, rate, rotation and size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np


def clip(
    frames: int = 12,
    *,
    container: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 10,
    size_hw_px: tuple[int, int] = (48, 64),
    turned: int = 0,
    times: Sequence[int] = (),
    aspect: int = 1,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video whose n-th frame is gray 10 n below and white above.

    turned: counterclockwise, in degrees, that it is to be shown. times: of its frames, in units of 1 / rate.
    aspect: width of a pixel over its height. options: of encoder and container.
    """
    height_px, width_px = size_hw_px
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turned:
            stream.set_display_rotation(turned)
        output.start_encoding()  # what is written even without a frame
        for number in range(frames):
            pixels = np.full((height_px, width_px, 3), (10 * number) % 240, np.uint8)
            pixels[: height_px // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts = times[number]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def gray(pixels: np.ndarray) -> float:
    """The number of a frame, by its lower half."""
    return float(pixels[-len(pixels) // 2 :].mean()) / 10


def sound(container: str = "mp4") -> bytes:
    """A file without a moving picture: silence."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("aac", rate=16000)
        for _ in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
