"""Draws a packed batch: the images as the student sees them, masks, padding, each rank's load and the plan's figures.

usage: python -m tools.view_batch PRESET --out FILE.png [--step N] [--dp-ranks N] [flags of the trainer]

--step N      which step of the run (0)
--dp-ranks N  how many data-parallel ranks the batch is placed on; the first one's packs are drawn (1)

Masked patches are shaded, padding is gray, and under each image stands its caption as the text tower reads it.
Exit status: 0, or 2 for a configuration or shards that cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cogvit.batch import PackedImages, PackedText, StepBatch
from cogvit.config import RunConfig
from cogvit.config.arguments import asks_for_help
from cogvit.config.split import train_part
from cogvit.errors import CogViTError, ConfigError
from cogvit.model.tokenizer import load_tokenizer
from cogvit.stages import read_run, stage_of
from data_pipeline.index import Index, open_index
from data_pipeline.loader import lay_out, start_position, step_batches, step_loader, usable_index
from data_pipeline.topology import topology_of

Color: TypeAlias = tuple[int, ...]  # red, green, blue

WIDTH_PX = 1200
GAP_PX = 4
BAR_HEIGHT_PX = 120
PADDING_GRAY = 128
CELL_PX = 112  # of a caption, at least
LINE_PX = 13
NUM_LINES = 3  # of a caption
BAR_COLOR = (60, 110, 180)
LEGEND: Mapping[str, Color] = {"load of a rank": BAR_COLOR, "padding of a pack": (PADDING_GRAY,) * 3}


@dataclass(frozen=True, slots=True)
class View:
    """What is drawn."""

    step: int
    dp_ranks: int


def read_view(argv: list[str]) -> tuple[View, list[str]]:
    """Take this command's own flags out of a command line. Errors: ConfigError when one has no number."""
    numbers, rest = {"--step": 0, "--dp-ranks": 1}, list(argv)
    for flag in numbers:
        if flag in rest:
            place = rest.index(flag)
            value = rest[place + 1] if place + 1 < len(rest) else ""
            if not value.isdecimal() or (flag == "--dp-ranks" and value == "0"):
                raise ConfigError(f"{flag} {value!r} is no number of this command; see --help")
            numbers[flag] = int(value)
            del rest[place : place + 2]
    return View(numbers["--step"], numbers["--dp-ranks"]), rest


def unpatchify(images: PackedImages, slot: int, patch_px: int) -> NDArray[np.uint8]:
    """Return an image of a pack: [height, width, 3]."""
    start, stop = images.cu_seqlens[slot : slot + 2].tolist()
    patches, rows = images.patches[start:stop], int(images.grid_hw[slot, 0])
    pattern = "(rows columns) (c p q) -> (rows p) (columns q) c"
    return rearrange(patches, pattern, rows=rows, p=patch_px, q=patch_px).numpy()


@cache
def caption_font(size_px: int = 11) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of captions: one with Chinese where it is installed, or Pillow's own."""
    if find_spec("manimgx_fonts_cjk") is None:
        return ImageFont.load_default(size_px)
    with as_file(files("manimgx_fonts_cjk") / "NotoSansCJK-VF.otf.ttc") as path:
        font = ImageFont.truetype(path, size_px, index=2)  # the third face is the Chinese one
    font.set_variation_by_axes([400])
    return font


def captions_of(text: PackedText | None, config: RunConfig) -> list[str]:
    """Return the caption of each slot, out of its tokens; empty where a slot or the whole stage has none."""
    if text is None:
        return []
    tokenizer = load_tokenizer(config.data.tokenizer, config.text.vocab_size)
    bounds = text.cu_seqlens.tolist()
    return [tokenizer.decode(text.ids[start:stop].numpy()) for start, stop in pairwise(bounds[:-1])]


def wrapped(caption: str, width_px: int) -> list[str]:
    """Break a caption into lines of a width, at a space or, as in Chinese, at any character; the rest is left out."""
    lines, font = [""], caption_font()
    for character in caption:
        lines[-1] += character
        if font.getlength(lines[-1]) > width_px:
            head, space, tail = lines[-1].rpartition(" ")
            lines[-1:] = [head, tail] if space else [lines[-1][:-1], character]
    if len(lines) > NUM_LINES:
        lines = [*lines[: NUM_LINES - 1], f"{lines[NUM_LINES - 1][:-1]}\u2026"]
    return [line.strip() for line in lines if line.strip()]


def draw_pack(images: PackedImages, config: RunConfig, captions: Sequence[str] = ()) -> Image.Image:
    """Draw the images of a pack in rows, their captions below, and its padding as a gray area of as many patches."""
    patch_px = config.vision.patch_size
    cells: list[tuple[NDArray[np.uint8], list[str]]] = []
    for slot in range(images.num_slots):
        if images.grid_hw[slot, 0] > 0:
            pixels = stage_of(config).shade(unpatchify(images, slot, patch_px), int(images.key[slot]), config)
            cells.append((pixels, wrapped(captions[slot], max(CELL_PX, pixels.shape[1])) if captions else []))
    padding = int(images.cu_seqlens[-1] - images.cu_seqlens[-2]) * patch_px**2
    if padding:
        height_px = min(max([64, *(len(pixels) for pixels, _ in cells)]), padding)
        width_px = min(WIDTH_PX, max(1, padding // height_px))
        cells.append((np.full((-(-padding // width_px), width_px, 3), PADDING_GRAY, np.uint8), []))
    places, x, y, line_px = [], 0, 0, 0
    for pixels, lines in cells:
        cell_px = max(CELL_PX, pixels.shape[1]) if lines else pixels.shape[1]
        if x and x + cell_px > WIDTH_PX:
            x, y, line_px = 0, y + line_px + GAP_PX, 0
        places.append((x, y))
        x, line_px = x + cell_px + GAP_PX, max(line_px, len(pixels) + LINE_PX * len(lines))
    width_px = max([WIDTH_PX, *(pixels.shape[1] for pixels, _ in cells)])
    canvas = Image.new("RGB", (width_px, max(1, y + line_px)), "white")
    draw = ImageDraw.Draw(canvas)
    for (pixels, lines), (left, top) in zip(cells, places, strict=True):
        canvas.paste(Image.fromarray(pixels), (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + len(pixels) + LINE_PX * number), line, fill="black", font=caption_font())
    return canvas


def describe(index: Index, config: RunConfig, view: View) -> tuple[list[str], NDArray[np.int64]]:
    """Return the figures of a step, as lines, and the load of each rank."""
    reads = stage_of(config).reads
    batch = step_loader(index, config, reads=reads).planner.batch(view.step)
    layout = lay_out(batch, index, config, view.dp_ranks, reads=reads)
    load = np.bincount(layout.placement.rank, layout.cost, view.dp_ranks)
    tokens, packs = int(batch.patches.sum()), layout.placement.packs_per_rank * view.dp_ranks
    shares = np.bincount(batch.share, batch.cost, config.data.canonical_shares)
    bound = max(load.mean(), layout.cost.max())
    valid = tokens / (packs * config.data.tokens_per_pack)
    position = start_position(index, config, reads=reads)
    lines = [
        f"step {view.step} of plan {position.plan_hash}: {int(batch.images.sum()):,} images, {tokens:,} patch tokens,"
        f" epochs {batch.epoch.min()} to {batch.epoch.max()}, {batch.downsized.sum():,} images downsized",
        f"{layout.placement.packs_per_rank} packs of {config.data.tokens_per_pack:,} tokens on each of {view.dp_ranks}"
        f" ranks: {valid:.1%} valid tokens, heaviest rank {load.max() / bound:.4f} x the bound",
        f"{len(shares)} canonical shares, heaviest {shares.max() / shares.mean():.4f} x the mean",
    ]
    return lines, load


def draw_loads(lines: list[str], load: NDArray[np.int64], legend: Mapping[str, Color]) -> Image.Image:
    """Draw the figures, the legend, and the load of each rank as a bar."""
    top_px = 16 * len(lines) + 28
    canvas = Image.new("RGB", (WIDTH_PX, top_px + BAR_HEIGHT_PX + 8), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, line in enumerate(lines):
        draw.text((4, 16 * number + 2), line, fill="black", font=font)
    left_px = 4.0
    for told, color in legend.items():
        draw.rectangle((left_px, top_px - 20, left_px + 12, top_px - 8), fill=color)
        draw.text((left_px + 17, top_px - 21), told, fill="black", font=font)
        left_px += 17 + font.getlength(told) + 18
    width_px = WIDTH_PX / len(load)
    for rank, one in enumerate(load):
        height_px = BAR_HEIGHT_PX * one / load.max()
        left, bottom = rank * width_px, top_px + BAR_HEIGHT_PX
        draw.rectangle((left, bottom - height_px, left + max(width_px - 2, 0), bottom), fill=BAR_COLOR)
    return canvas


def draw_step(step: StepBatch, lines: list[str], load: NDArray[np.int64], config: RunConfig) -> Image.Image:
    """Put figures, loads and packs under each other."""
    packs = (draw_pack(micro.images, config, captions_of(micro.text, config)) for micro in step.micro)
    parts = [draw_loads(lines, load, {**LEGEND, **dict(stage_of(config).legend)}), *packs]
    width_px = max(part.width for part in parts)
    canvas = Image.new("RGB", (width_px, sum(part.height + 3 * GAP_PX for part in parts)), "white")
    top_px = 0
    for part in parts:
        canvas.paste(part, (0, top_px))
        top_px += part.height + 3 * GAP_PX
    return canvas


def view_batch(argv: list[str]) -> None:
    """Draw what a command line asks for, and print the figures."""
    view, rest = read_view(argv)
    config = read_run(rest[0], rest[1:])
    if not config.out.endswith(".png"):
        raise ConfigError(f"--out {config.out!r} must name a .png file")
    if config.data.order == "sequential":
        raise ConfigError("--data.order sequential plans nothing that could be shown; pass --data.order planned")
    reads = stage_of(config).reads
    if reads == "answers":
        raise ConfigError(f"{rest[0]} plans nothing that could be shown: a policy trains on what it answers itself")
    index = usable_index(open_index(train_part(config.data), config.data.shards), reads)
    start = start_position(index, config, reads=reads)
    seat = topology_of(["here"] * view.dp_ranks, config.data.canonical_shares).seat(0)
    with closing(step_batches(index, config, seat, replace(start, step=view.step), reads=reads)) as batches:
        step = next(batches)
    lines, load = describe(index, config, view)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    draw_step(step, lines, load, config).save(config.out)
    print("\n".join([*lines, config.out]))


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        view_batch(argv)
        return 0
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
