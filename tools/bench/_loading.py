"""Images a second of one core: our loader beside PyTorch's DataLoader over webdataset and Pillow, taking turns."""

from __future__ import annotations

import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from einops import rearrange
from PIL import Image
from skimage import data as photographs
from torch.utils.data import DataLoader

from cogvit.config import DataConfig, RunConfig
from cogvit.model.config import CogViTConfig
from cogvit.model.naflex import naflex_grid
from cogvit.model.packing import patchify
from cogvit.teacher.actors import connect, plan_cluster
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.loader import step_batches
from data_pipeline.server import BatchServer, served_batches
from data_pipeline.topology import topology_of

PATCH_PX = 14
MAX_PATCHES = 256
BATCH = 64
ROUNDS = 3
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True)
class Rate:
    """What one loader did."""

    images_per_s: float
    images_per_cpu_s: float  # of all threads together: what a core does when others are busy


def write_jpegs(path: Path, count: int, height_px: int, width_px: int) -> None:
    """Write a shard of photographs of one size; each is another part of its original."""
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(getattr(photographs, name)()) for name in PHOTOGRAPHS]
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            original = originals[number % len(originals)]
            scale = rng.uniform(0.5, 1.0) * min(original.width / width_px, original.height / height_px)
            left, top = rng.uniform(0, 1, 2) * (original.width - width_px * scale, original.height - height_px * scale)
            box = (left, top, left + width_px * scale, top + height_px * scale)
            data = io.BytesIO()
            original.resize((width_px, height_px), Image.Resampling.BICUBIC, box).save(data, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))


def our_config(shard: Path) -> RunConfig:
    """Return a run that trains on a shard."""
    data = DataConfig(
        shards=str(shard),
        global_batch_images=BATCH,
        tokens_per_pack=BATCH * MAX_PATCHES,
        images_per_pack=BATCH,
        max_patches=MAX_PATCHES,
        canonical_shares=1,
    )
    return RunConfig(vision=CogViTConfig(patch_size=PATCH_PX), data=data)


def our_batches(index: Index, config: RunConfig, server: BatchServer | None = None) -> Iterator[int]:
    """Yield the number of images of each step of our loader, or of a batch server."""
    load = step_batches if server is None else partial(served_batches, server)
    with closing(load(index, config, topology_of(["here"], 1).seat(0), None, reads="images")) as batches:
        for step in batches:
            yield sum(int(micro.images.weight.sum()) for micro in step.micro)


def peers_batches(shard: Path, resampling: Image.Resampling) -> Iterator[int]:
    """Yield the number of images of each batch of the peer: Pillow decodes, resizes and hands over patches."""

    def prepare(sample: dict[str, Any]) -> torch.Tensor:
        image = sample["jpg"]
        rows, columns = naflex_grid(image.height, image.width, PATCH_PX, MAX_PATCHES, enlarge=False)
        image = image.resize((columns * PATCH_PX, rows * PATCH_PX), resampling)
        return patchify(rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w"), PATCH_PX)

    samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).repeat().decode("pil")
    loader = DataLoader(samples.map(prepare), batch_size=BATCH, num_workers=0, collate_fn=torch.cat)
    for batch in loader:
        yield len(batch) // (len(batch) // BATCH)


def rate(batches: Iterator[int], steps: int) -> Rate:
    """Take some batches after a first one; with one thread, nothing of them is decoded by then."""
    next(batches)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    images = sum(islice(batches, steps))
    return Rate(images / (time.perf_counter() - wall_s), images / (time.process_time() - cpu_s))


def table(directory: Path) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| images | loader | images/s, median | images per CPU second, median | times the first, per CPU second |"
    yield "|---|---|---|---|---|"
    for height_px, width_px, count, steps in ((375, 500, 256, 4), (1080, 1920, 64, 1)):
        shard = directory / f"jpeg_{height_px}.tar"
        write_jpegs(shard, count, height_px, width_px)
        for _ in build_index(str(shard)):
            continue
        yield from compare(f"{width_px} x {height_px} JPEG", shard, steps)


def compare(name: str, shard: Path, steps: int) -> Iterator[str]:
    """Yield a line for each loader; they take turns."""
    index = load_index(str(shard))
    loaders: dict[str, Callable[[], Iterator[int]]] = {
        "DataLoader + webdataset + Pillow, bicubic": lambda: peers_batches(shard, Image.Resampling.BICUBIC),
        "DataLoader + webdataset + Pillow, bilinear": lambda: peers_batches(shard, Image.Resampling.BILINEAR),
        "ours": lambda: our_batches(index, our_config(shard)),
    }
    found: dict[str, list[Rate]] = {loader: [] for loader in loaders}
    for _ in range(ROUNDS):
        for loader, start in loaders.items():
            batches = start()
            found[loader].append(rate(batches, steps))
            batches.close()  # type: ignore[attr-defined]
    medians = {
        loader: Rate(
            statistics.median(one.images_per_s for one in rates),
            statistics.median(one.images_per_cpu_s for one in rates),
        )
        for loader, rates in found.items()
    }
    peer = next(iter(medians.values()))
    for loader, median in medians.items():
        times = median.images_per_cpu_s / peer.images_per_cpu_s
        yield (f"| {name} | {loader} | {median.images_per_s:,.0f} | {median.images_per_cpu_s:,.0f} | {times:.2f} |")


def serving(directory: Path) -> Iterator[str]:
    """Yield the lines of a table of what batches cost the rank that trains on them."""
    shard = directory / "served.tar"
    write_jpegs(shard, 256, 375, 500)
    for _ in build_index(str(shard)):
        continue
    index, config = load_index(str(shard)), our_config(shard)
    yield "| 500 x 375 JPEG, made by | ms of the rank's CPU an image, median |"
    yield "|---|---|"
    with connect(plan_cluster(""), num_cpus=0):
        makers = {"threads of the rank": None, "the node's batch server": BatchServer(num_threads=1, max_wait_s=300.0)}
        found: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(ROUNDS):
            for name, server in makers.items():
                batches = our_batches(index, config, server)
                found[name].append(1e3 / rate(batches, 8).images_per_cpu_s)
                batches.close()  # type: ignore[attr-defined]
    for name, costs in found.items():
        yield f"| {name} | {statistics.median(costs):.3f} |"
