"""Writes short videos with questions about order and time, drawn by this program: a corpus for the preset demo_video.

usage: python -m tools.make_demo_videos --out DIR [--train N] [--heldout N] [--seed N]

Each video shows a circle, in a warm color, and a square, in a cold one, one after the other. Half of the questions ask
which came first; the answer needs the order of the frames and no times. The others ask when one of them appeared, in
whole seconds; the rate of each video is drawn by itself, so that neither the number of a frame nor the times of all
frames say the answer.

--out DIR     new directory, for DIR/train/*.tar, DIR/heldout/*.tar and DIR/language: a tiny language model of random
              weights with a tokenizer of the words that occur
--train N     videos to learn from (default: 4000)
--heldout N   videos to ask about (default: 600)
--seed N      of every drawing (default: 0)
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from webdataset import TarWriter

from cogvit import CausalLM
from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from tools.make_demo_language_model import tiny_shape, train_tokenizer

SIDE_PX = 64
SHOWN_FRAMES = 6  # that --video.frames takes, evenly; between two of them lies another one
LONGEST_PERIOD_S = 8  # from one shown frame to the next, in whole seconds from one on
SHAPES = ("circle", "square")
SOURCES = ("order", "time")  # kinds of questions
# Of its own for each shape: at 16 px an encoder that begins with nothing does not tell a circle from a square by form.
COLORS = {"circle": ("crimson", "darkorange", "deeppink"), "square": ("royalblue", "seagreen", "teal")}
SHARD_VIDEOS = 1000


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = ""
    train: str = "4000"
    heldout: str = "600"
    seed: str = "0"


@dataclass(frozen=True)
class Story:
    """What happens in a video, and a question about it."""

    places: tuple[int, int]  # the shown frame in which circle and square appear
    period_s: int  # from one shown frame to the next
    source: str  # order or time
    question: str
    answer: str


def make(arguments: Arguments) -> int:
    """Write both parts; returns the exit status."""
    out = Path(arguments.out)
    if not arguments.out:
        raise ConfigError("--out DIR is needed: a new directory for the videos")
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose a new directory")
    for name in ("train", "heldout", "seed"):
        if not getattr(arguments, name).isdigit():
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be a whole number")
    for number, part in enumerate(("train", "heldout")):
        draw = np.random.default_rng([int(arguments.seed), number])
        write_part(out / part, int(getattr(arguments, part)), draw)
    write_language_model(out / "language", int(arguments.seed))
    print(
        f"{out}: {arguments.train} videos to learn from, {arguments.heldout} to ask about; drawn, free of any license"
    )
    return 0


def write_part(directory: Path, count: int, draw: np.random.Generator) -> None:
    """Write shards of videos with a conversation each."""
    directory.mkdir(parents=True)
    for start in tqdm(range(0, count, SHARD_VIDEOS), unit="shard", disable=None):
        with TarWriter(str(directory / f"videos-{start // SHARD_VIDEOS:05d}.tar"), encoder=False, mtime=0) as shard:
            for number in range(start, min(start + SHARD_VIDEOS, count)):
                one = story(draw)
                shard.write({"__key__": f"v{number:06d}", "mp4": film(one, draw), "json": conversation(one)})


def write_language_model(directory: Path, seed: int) -> None:
    """Write the demo's language model with four layers instead of sixteen, and weights that nobody has trained."""
    longest_s = LONGEST_PERIOD_S * (SHOWN_FRAMES - 1)
    pairs = [
        spoken(source, asked, second) for source in SOURCES for asked in range(2) for second in range(1, longest_s + 1)
    ]
    tokenizer = train_tokenizer([text for pair in pairs for text in pair])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CausalLM(replace(tiny_shape(tokenizer), depth=4))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def spoken(source: str, asked: int, seconds: int) -> tuple[str, str]:
    """Return a question about a shape, and its answer where the shape came first, after so many seconds."""
    if source == "time":
        return f"When did the {SHAPES[asked]} appear?", f"{seconds} seconds"
    return f"Which came first, the {SHAPES[asked]} or the {SHAPES[1 - asked]}?", SHAPES[asked]


def story(draw: np.random.Generator) -> Story:
    """Draw what happens: the rate and the places of the shapes are independent of each other."""
    first, second = draw.choice(SHOWN_FRAMES - 1, 2, replace=False) + 1
    places, asked, period_s = (int(first), int(second)), int(draw.integers(2)), int(draw.integers(LONGEST_PERIOD_S)) + 1
    source = SOURCES[draw.integers(2)]
    question, answer = spoken(source, asked, period_s * places[asked])
    if source == "order":
        answer = SHAPES[int(places[1] < places[0])]
    return Story(places, period_s, source, question, answer)


def conversation(shown: Story) -> bytes:
    """Return a question about a video and its answer."""
    asked = [{"type": "video"}, {"type": "text", "text": shown.question}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": shown.answer},
    ]
    return json.dumps({"source": shown.source, "messages": turns}).encode()


def film(shown: Story, draw: np.random.Generator) -> bytes:
    """Return an mp4: each shape is there from its shown frame on until the next one."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        # Every frame by itself: what is left of earlier ones would tell the order of frames that were shuffled.
        stream = output.add_stream("mpeg4", rate=Fraction(2, shown.period_s), options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = SIDE_PX, SIDE_PX, "yuv420p", 1
        drawn = list(pictures(shown, draw))
        for number in range(2 * SHOWN_FRAMES - 1):
            output.mux(stream.encode(av.VideoFrame.from_image(drawn[number // 2])))
        output.mux(stream.encode(None))
    return file.getvalue()


def pictures(shown: Story, draw: np.random.Generator) -> Iterator[Image.Image]:
    """Yield the shown frames."""
    figures = []
    for shape in SHAPES:
        side = int(draw.integers(SIDE_PX // 2, SIDE_PX * 3 // 4))
        left, top = draw.integers(2, SIDE_PX - side - 2, 2).tolist()
        figures.append((left, top, side, COLORS[shape][draw.integers(len(COLORS[shape]))]))
    for place in range(SHOWN_FRAMES):
        canvas = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        brush = ImageDraw.Draw(canvas)
        for shape, own, (left, top, side, color) in zip(SHAPES, shown.places, figures, strict=True):
            if own == place:
                box = (left, top, left + side, top + side)
                (brush.ellipse if shape == "circle" else brush.rectangle)(box, fill=color)
        yield canvas


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, make))
