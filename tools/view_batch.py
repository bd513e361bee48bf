"""Draws a packed batch: the images as the student sees them, masks, padding, each rank's load and the plan's figures.

usage: python -m tools.view_batch PRESET --out FILE.png [--step N] [--dp-ranks N] [flags of the trainer]

--step N      which step of the run (0)
--dp-ranks N  how many data-parallel ranks the batch is placed on; the first one's packs are drawn (1)

Masked patches are shaded and padding is gray. Exit status: 0, or 2 for a configuration or shards that cannot be used.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cogvit.batch import PackedImages, StepBatch
from cogvit.config import RunConfig
from cogvit.config.arguments import asks_for_help
from cogvit.config.split import train_part
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import read_run, stage_of
from data_pipeline.index import Index, open_index
from data_pipeline.loader import lay_out, start_position, step_batches, step_loader, usable_index
from data_pipeline.topology import topology_of

WIDTH_PX = 1200
GAP_PX = 4
BAR_HEIGHT_PX = 120
PADDING_GRAY = 128


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


def draw_pack(images: PackedImages, config: RunConfig) -> Image.Image:
    """Draw the images of a pack in rows, and its padding as a gray area of as many patches."""
    patch_px = config.vision.patch_size
    pictures = []
    for slot in range(images.num_slots):
        if images.grid_hw[slot, 0] > 0:
            pixels = unpatchify(images, slot, patch_px)
            pictures.append(stage_of(config).shade(pixels, int(images.key[slot]), config))
    padding = int(images.cu_seqlens[-1] - images.cu_seqlens[-2]) * patch_px**2
    if padding:
        height_px = min(max([64, *(len(one) for one in pictures)]), padding)
        width_px = min(WIDTH_PX, max(1, padding // height_px))
        pictures.append(np.full((-(-padding // width_px), width_px, 3), PADDING_GRAY, np.uint8))
    places, x, y, line_px = [], 0, 0, 0
    for picture in pictures:
        if x and x + picture.shape[1] > WIDTH_PX:
            x, y, line_px = 0, y + line_px + GAP_PX, 0
        places.append((x, y))
        x, line_px = x + picture.shape[1] + GAP_PX, max(line_px, len(picture))
    width_px = max([WIDTH_PX, *(picture.shape[1] for picture in pictures)])
    canvas = Image.new("RGB", (width_px, max(1, y + line_px)), "white")
    for picture, place in zip(pictures, places, strict=True):
        canvas.paste(Image.fromarray(picture), place)
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
        "bars: the load of each rank; below, one block a pack of the first rank: its images, shaded where a patch is"
        " masked (stage 1), and in gray its padding",
    ]
    return lines, load


def draw_loads(lines: list[str], load: NDArray[np.int64]) -> Image.Image:
    """Draw the figures, and the load of each rank as a bar."""
    top_px = 16 * len(lines) + 8
    canvas = Image.new("RGB", (WIDTH_PX, top_px + BAR_HEIGHT_PX + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((4, 16 * number + 4), line, fill="black")
    width_px = WIDTH_PX / len(load)
    for rank, one in enumerate(load):
        height_px = BAR_HEIGHT_PX * one / load.max()
        left, bottom = rank * width_px, top_px + BAR_HEIGHT_PX
        draw.rectangle((left, bottom - height_px, left + max(width_px - 2, 0), bottom), fill=(60, 110, 180))
    return canvas


def draw_step(step: StepBatch, lines: list[str], load: NDArray[np.int64], config: RunConfig) -> Image.Image:
    """Put figures, loads and packs under each other."""
    parts = [draw_loads(lines, load), *(draw_pack(micro.images, config) for micro in step.micro)]
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
