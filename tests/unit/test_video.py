"""Videos as frames with their times: which are shown, and thirty files that are odd, broken or hostile."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvit.errors import ConfigError, DataError
from cogvit.model.config import VideoConfig
from cogvit.model.video import MAX_BYTES, VideoReader, frame_times, shown_parts, time_text
from tests.clips import clip, gray, sound

MP4, AVI, WEBM = clip(), clip(container="avi"), clip(container="webm", codec="libvpx-vp9")
MKV = clip(container="matroska", codec="libx264")
PIECES = clip(60, options={"movflags": "frag_keyframe+empty_moov", "g": "5"})
RANDOM = random.Random(0).randbytes(5000)
LONG_AVI, RAW = clip(80, container="avi"), clip(container="avi", codec="rawvideo")


def damaged(data: bytes, places: int) -> bytes:
    """A file with random bytes in it."""
    draw, found = random.Random(places), bytearray(data)
    for _ in range(places):
        found[draw.randrange(64, len(found))] = draw.randrange(256)
    return bytes(found)


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    videos = VideoReader()
    yield videos
    videos.close()


def times(frames: int, last_ms: int, cfg: VideoConfig) -> list[int]:
    count, found = frame_times(np.array([frames]), np.array([last_ms]), cfg)
    assert count.tolist() == [len(found)]
    return found.tolist()


def test_frames_are_spread_evenly_or_come_at_intervals() -> None:
    assert times(1800, 90_000, VideoConfig(frames=4)) == [0, 20_000, 40_000, 60_000]
    assert times(1800, 9_000, VideoConfig(frames=4, first_s=0.0)) == [0, 3000, 6000, 9000]
    assert times(3, 9_000, VideoConfig(frames=24)) == [0, 4500, 9000]
    assert times(90, 2_999, VideoConfig(every_s=1.0)) == [0, 1000, 2000]
    assert times(900, 90_000, VideoConfig(frames=3, every_s=0.5)) == [0, 500, 1000]
    assert times(1, 0, VideoConfig(frames=1)) == [0] and times(0, 0, VideoConfig(every_s=1.0)) == []
    assert [time_text(one, VideoConfig()) for one in (0, 2_449, 2_450, 71_000)] == ["0.0s", "2.4s", "2.5s", "71.0s"]
    assert time_text(5, VideoConfig(times=False)) == ""


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10**7))), st.integers(1, 30), st.sampled_from([0.0, 0.7]))
def test_many_videos_are_counted_as_one_by_one(videos: list[tuple[int, int]], most: int, every_s: float) -> None:
    cfg = VideoConfig(most, every_s, 60.0)
    frames, last_ms = np.array(videos, np.int64).reshape(-1, 2).T
    count, found = frame_times(frames, last_ms, cfg)
    assert found.tolist() == [one for video in videos for one in times(*video, cfg)]
    assert (count <= most).all() and ((count > 0) == (frames > 0)).all() and (found <= 60_000).all()


@pytest.mark.parametrize("values", [{"frames": 0}, {"every_s": -1.0}, {"first_s": float("inf")}, {"every_s": 1e-9}])
def test_numbers_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"video\.{next(iter(values))}="):
        VideoConfig(**values)  # type: ignore[arg-type]


SOUND: list[tuple[str, Callable[[], bytes], tuple[int, int, int, int], list[int]]] = [
    ("mp4", lambda: MP4, (48, 64, 12, 1100), [0, 5, 11]),
    ("avi", lambda: AVI, (48, 64, 12, 1100), [0, 5, 11]),
    ("webm", lambda: WEBM, (48, 64, 12, 1100), [0, 5, 11]),
    ("mkv with frames out of order", lambda: MKV, (48, 64, 12, 1100), [0, 5, 11]),
    ("avi with frames out of order", lambda: clip(container="avi", codec="libx264"), (48, 64, 12, 1100), [0, 5, 11]),
    ("mov", lambda: clip(container="mov", codec="libx264"), (48, 64, 12, 1100), [0, 5, 11]),
    ("several groups", lambda: clip(22, codec="libx264", options={"g": "4"}), (48, 64, 22, 2100), [0, 10, 21]),
    ("one frame", lambda: clip(1), (48, 64, 1, 0), [0, 0, 0]),
    ("variable rate", lambda: clip(4, times=[0, 1, 2, 90]), (48, 64, 4, 9000), [0, 2, 3]),
    ("late start", lambda: clip(4, times=[30, 31, 32, 33], container="matroska"), (48, 64, 4, 300), [0, 1, 3]),
    ("huge", lambda: clip(1, size_hw_px=(2160, 3840)), (2160, 3840, 1, 0), [0, 0, 0]),
    ("thin", lambda: clip(2, size_hw_px=(16, 4000)), (16, 4000, 2, 100), [0, 0, 1]),
    ("cut in pieces", lambda: PIECES[: len(PIECES) * 3 // 4], (48, 64, -1, -1), []),
    ("cut avi without its index", lambda: LONG_AVI[: len(LONG_AVI) * 3 // 4], (48, 64, -1, -1), []),
]


@pytest.mark.parametrize(("make", "measured", "shown"), [pytest.param(*rest, id=name) for name, *rest in SOUND])
def test_what_can_be_read_shows_what_was_on_the_screen(
    reader: VideoReader, make: Callable[[], bytes], measured: tuple[int, int, int, int], shown: list[int]
) -> None:
    data = make()
    found = reader.measure(data)
    if shown:
        assert (found.height_px, found.width_px, found.frames, found.last_ms) == measured
        frames = reader.frames(data, [0, found.last_ms // 2, found.last_ms], (16, 32))
        assert [round(gray(frame)) for frame in frames] == shown
    else:  # what is there of it
        assert 20 < found.frames < 79
        assert round(gray(reader.frames(data, [1000], (48, 64))[0])) == 10


BROKEN: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty", lambda: b"", "no known video format"),
    ("random bytes", lambda: RANDOM, "no known video format"),
    ("an mp4's header, then random bytes", lambda: MP4[:64] + RANDOM, "no known video format"),
    ("an avi's header, then random bytes", lambda: AVI[:400] + RANDOM, "a video with"),
    ("a webm's header, then random bytes", lambda: WEBM[:300] + RANDOM, "no known|a video with"),
    ("cut before its index", lambda: MP4[: MP4.index(b"moov") - 4], "no known video format"),
    ("cut inside its index", lambda: MP4[: len(MP4) // 2], "without a moving picture"),
    ("cut before the first frame", lambda: WEBM[: len(WEBM) // 2], "a video without frames"),
    ("zero frames", lambda: clip(0, container="avi"), "a video without frames"),
    ("sound alone", sound, "a video without a moving picture, sound alone"),
    (
        "a bomb",
        lambda: RAW.replace(pack("<ii", 64, 48), pack("<ii", 60_000, 60_000)),
        "too large a one",
    ),
    ("a picture of no size", lambda: RAW.replace(pack("<ii", 64, 48), pack("<ii", 0, 48)), "frames have no size"),
    ("text", lambda: b"hello " * 200, "no known video format"),
    ("a playlist of a file", lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "no known video format"),
    ("a list of files", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "no known video format"),
    ("a picture", lambda: b"\xff\xd8\xff\xe0" + RANDOM, "no known video format"),
    ("an archive", lambda: b"PK\x03\x04" + RANDOM, "no known video format"),
]


@pytest.mark.parametrize(("make", "reason"), [pytest.param(*rest, id=name) for name, *rest in BROKEN])
def test_what_cannot_be_read_has_a_reason(reader: VideoReader, make: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        reader.measure(make())


@pytest.mark.parametrize("data", [MP4, AVI, WEBM, MKV, LONG_AVI], ids=["mp4", "avi", "webm", "mkv", "long avi"])
def test_damage_anywhere_is_read_or_refused(reader: VideoReader, data: bytes) -> None:
    """Twenty files of each kind; nothing but a DataError comes out, in a time that a person would wait."""
    start_s = time.monotonic()
    for places in range(1, 21):
        broken = damaged(data, 2 * places)
        try:
            found = reader.measure(broken)
            for frame in reader.frames(broken, [0, found.last_ms], (8, 8)):
                assert frame.ndim == 3 and frame.dtype == np.uint8
        except DataError as error:
            assert str(error)
    assert time.monotonic() - start_s < 60.0


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_frames_are_turned_upright(reader: VideoReader, turned: int) -> None:
    data = clip(2, turned=turned)
    found = reader.measure(data)
    (frame,) = reader.frames(data, [0], (found.height_px, found.width_px))
    assert frame.shape[:2] == (found.height_px, found.width_px) == ((48, 64) if turned == 180 else (64, 48))
    white = {90: frame[:, :8], -90: frame[:, -8:], 180: frame[-8:]}[turned]
    assert white.mean() > 230 and frame.mean() < 120


def test_a_hang_or_a_crash_costs_one_video() -> None:
    reader = VideoReader(limit_s=0.001)  # the wall's 4 ms end it before the processor's second does
    with pytest.raises(DataError, match=r"more than 0\.001 s"):
        reader.measure(clip(1, size_hw_px=(2160, 3840)))
    reader = VideoReader()
    assert reader.measure(MP4).frames == 12
    (child,) = reader._idle
    child._process.send_signal(signal.SIGSTOP)
    threading.Timer(0.2, child._process.send_signal, [signal.SIGSEGV]).start()
    threading.Timer(0.3, child._process.send_signal, [signal.SIGCONT]).start()
    with pytest.raises(DataError, match=r"it ends the process that reads it: a crash of FFmpeg \(status -11\)"):
        reader.measure(MP4)
    assert reader.measure(MP4).frames == 12
    (child,) = reader._idle
    child._process.kill()
    child._process.wait()
    assert reader.measure(MP4).frames == 12  # one that is gone while nobody asks costs nothing
    reader.close()


def test_children_end_with_their_reader() -> None:
    reader = VideoReader()
    reader.measure(MP4)
    (child,) = reader._idle
    reader.close()
    assert child._process.poll() is not None


def test_without_pyav_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvit.model.video.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cogvit\[video\]'"):
        VideoReader().measure(MP4)


def test_a_users_video_is_frames_with_times(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(MP4)
    parts = list(shown_parts({"type": "video", "video": path}, VideoConfig(frames=2)))
    assert [part.get("text") for part in parts] == ["0.0s", None, "1.1s", None]
    assert [round(gray(part["image"])) for part in parts[1::2]] == [0, 11]
    path.write_bytes(sound())
    with pytest.raises(DataError, match=rf"the video {path} cannot be read: a video without a moving picture"):
        list(shown_parts({"type": "video", "video": path}, VideoConfig()))
    with path.open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match="more than 1,073,741,824 bytes"):
        list(shown_parts({"type": "video", "video": str(path)}, VideoConfig()))
    with pytest.raises(DataError, match="No such file"):
        list(shown_parts({"type": "video", "video": "gone.mp4"}, VideoConfig()))
