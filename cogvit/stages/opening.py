"""What a start says of a run in one line, and what it warns of, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cogvit.config import RunConfig
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


def opening(stage: Stage, config: RunConfig, corpus: Corpus, processes: str) -> Iterator[str]:
    """Yield a line on a run's data, one on its size, and a warning where most images are made smaller.

    processes: how many there are and on what, as "2 x cpu".
    """
    from cogvit.training.feed import describe
    from data_pipeline.loader import usable_index
    from data_pipeline.sizing import sizing_of

    yield describe(config, corpus)
    data = config.data
    parameters = in_millions(num_parameters(stage, config))
    if corpus.train is None:
        yield f"run: {parameters} parameters; {data.global_batch_images:,} images a step; {processes}"
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
        f"{len(index) / data.global_batch_images:,.1f} steps an epoch, {config.schedule.steps:,} in all; {processes}"
    )
    downsized = float(sizing.exceeds(height_px, width_px).mean())
    if downsized > _DOWNSIZED:
        yield (
            f"warning: {downsized:.0%} of the images have more than data.max_patches={data.max_patches} patches of "
            f"{config.vision.patch_size} px and are made smaller; --data.max-patches N shows more of them"
        )
