"""What the two passes of stage 2 cost beside one pass: the demo's towers on one process."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from cogvit.batch import Batch, PackedText
from cogvit.config import ParallelConfig
from cogvit.model.packing import pack_images
from cogvit.parallel.mesh import start_mesh
from cogvit.parallel.schedule import Schedule
from cogvit.stages import build
from configs.demo_stage2 import config as demo_stage2
from tools.bench._probe import Probe, probe

GRID = (6, 6)
IMAGES = 256
CAPTION_TOKENS = 24


def microbatch(first: int, count: int, patch_px: int) -> Batch:
    """Return some images of random pixels, all of one size, with captions of one length."""
    g = torch.Generator().manual_seed(first)
    pixels = torch.randint(0, 256, (count, GRID[0] * GRID[1], 3 * patch_px**2), generator=g).to(torch.uint8)
    number = torch.arange(first, first + count)
    images = pack_images(list(pixels), [GRID] * count, key_N=number)
    bounds = torch.arange(count + 1, dtype=torch.int32) * CAPTION_TOKENS
    text = PackedText(
        ids=torch.randint(3, 259, (count * CAPTION_TOKENS,), generator=g),
        position=torch.arange(CAPTION_TOKENS, dtype=torch.int32).repeat(count),
        cu_seqlens=torch.cat([bounds, bounds[-1:]]),
        caption_id=number,
        concept_id=number,
        weight=torch.ones(count),
    )
    return Batch(images, text, None, (None,) * count)


def run_step(num_micro: int, rounds: int) -> list[Probe]:
    """Compute one step's loss and gradients, several times, in this process."""
    torch.set_num_threads(1)
    mesh, config = start_mesh(ParallelConfig()), demo_stage2()
    count = IMAGES // num_micro
    data = replace(config.data, tokens_per_pack=count * GRID[0] * GRID[1], images_per_pack=count)
    config = replace(config, data=replace(data, text_tokens_per_pack=count * CAPTION_TOKENS))
    model, objective = build(config, mesh, {})
    micro = [microbatch(first, count, config.vision.patch_size) for first in range(0, IMAGES, count)]
    schedule = Schedule(mesh, config.precision)

    def step() -> None:
        objective.train(model, micro, schedule)

    step()
    return [probe(step) for _ in range(rounds)]


def step_lines(micro: Sequence[int], rounds: int) -> Iterator[str]:
    """Yield the table of one pass and two passes over the same global batch."""
    patches = GRID[0] * GRID[1]
    yield f"One step of the demo's towers: {IMAGES} images of {patches} patches, captions of {CAPTION_TOKENS} tokens,"
    yield "one process, one thread, loss and all gradients."
    yield ""
    yield "| microbatches | passes | CPU s | peak MiB |"
    yield "|---|---|---|---|"
    for number in micro:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            probes = pool.submit(run_step, number, rounds).result()
        cpu_s, peak = statistics.median(one.cpu_s for one in probes), max(one.peak_bytes for one in probes)
        yield f"| {number} | {1 if number == 1 else 2} | {cpu_s:.2f} | {peak / 2**20:,.0f} |"
