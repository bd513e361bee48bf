"""What a start says of a run in one line, and what it warns of, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from cogvit.config import RunConfig
from cogvit.config.device import device_name
from cogvit.model.attention import varlen_kernel_takes
from cogvit.stages.protocol import Stage

if TYPE_CHECKING:
    from cogvit.training.feed import Corpus

_LOOKED_AT = 10_000  # images, evenly spread over the corpus, also those that the run leaves out
_DOWNSIZED = 0.5  # share of the images from which on it is said


def num_parameters(stage: Stage, config: RunConfig) -> int:
    """Return the parameters that a stage trains, all towers together."""
    return sum(load.parameters for load in stage.loads(config))


def in_millions(count: int) -> str:
    """Return a number of parameters as 28.6M, or 403M from a hundred on."""
    millions = count / 1e6
    return f"{millions:.0f}M" if millions >= 100 else f"{millions:.3g}M"


def opening(stage: Stage, config: RunConfig, corpus: Corpus, device: torch.device, num_processes: int) -> Iterator[str]:
    """Yield a line on a run's devices, on its data, on its size, and warnings of what will be slow or small."""
    from cogvit.training.feed import describe
    from data_pipeline.loader import usable_index
    from data_pipeline.sizing import sizing_of

    yield f"device: {num_processes} x {device_name(device)}, torch {torch.__version__}"
    yield from slow_kernels(stage, config, device)
    yield describe(config, corpus)
    data = config.data
    parameters = in_millions(num_parameters(stage, config))
    if corpus.train is None:
        yield f"run: {parameters} parameters; {data.global_batch_images:,} images a step"
        return
    index = usable_index(corpus.train, corpus.reads)
    looked_at = index.take(np.linspace(0, len(index.corpus) - 1, min(len(index.corpus), _LOOKED_AT)).astype(np.int64))
    looked_at = looked_at[looked_at["height_px"] > 0]  # conversations may be without an image
    height_px, width_px = looked_at["height_px"].astype(np.int64), looked_at["width_px"].astype(np.int64)
    if not len(looked_at):
        height_px = width_px = np.ones(1, np.int64)
    sizing = sizing_of(config)
    patches = sizing.grids(height_px, width_px).prod(axis=1)
    most, mean = int(patches.max()), float(patches.mean())
    yield (
        f"run: {parameters} parameters; {mean:.0f} patches of {config.vision.patch_size} px an image, at most {most}; "
        f"{data.global_batch_images:,} images, some {mean * data.global_batch_images:,.0f} patches a step; "
        f"{len(index) / data.global_batch_images:,.1f} steps an epoch, {config.schedule.steps:,} in all"
    )
    downsized = float(sizing.exceeds(height_px, width_px).mean())
    if downsized > _DOWNSIZED:
        yield (
            f"warning: {downsized:.0%} of the images have more than data.max_patches={data.max_patches} patches of "
            f"{config.vision.patch_size} px and are made smaller; --data.max-patches N shows more of them"
        )


def slow_kernels(stage: Stage, config: RunConfig, device: torch.device) -> Iterator[str]:
    """Yield a warning for each tower whose attention cannot run in one kernel on a GPU."""
    if device.type != "cuda" or config.precision != "bf16":
        return
    for tower in stage.towers(config):
        head_dim = tower.shape.embed_dim // tower.shape.num_heads
        if not varlen_kernel_takes(device, torch.bfloat16, head_dim):
            yield (
                f"warning: {tower.name} has heads of {head_dim} channels, and flash attention takes multiples of 8 up"
                f" to 256: images are batched by length, which is much slower; change {tower.name}.num_heads"
            )
