"""Speed and memory of the packed encoder beside the padded encoders of timm and transformers, on a CPU thread or a GPU.

usage: PYTHONPATH=.venv/peers python -m tools.bench.encoder [flags]   (`make bench` fills .venv/peers; two hours)
  --width 768 --depth 12 --heads 12   shape of every encoder
  --mixes fit-256,fit-1024,native,mixed
  --precisions fp32,bf16              bf16 is autocast
  --rounds 3                          each round runs every encoder once; the table has the medians
  --batches 2                         of which the images of a mix are made
  --device cpu                        cpu or cuda
  --batch-scale 1                     multiplies the images of a batch: a GPU wants 8 or more
  --out FILE                          also write the record there

All encoders see the same images and have the same blocks: LayerNorm, GELU, learned positions, no CLS token, no
QK-norm. The peers pad a batch to its longest image; they get their images in random order, as they are used, and sorted
by length. Useful tokens leave padding out. Times are CPU time of this process, which a busy neighbor distorts less than
a clock does, and on a GPU those of the clock; forward is that of the training step. Memory is what a forked child holds
at its peak above what it starts with, on a GPU what torch has allocated: activations, gradients and scratch, without
the weights.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.batch import to_device
from cogvit.config.device import device_flag, device_name, local_device
from cogvit.config.environment import Process
from cogvit.errors import ConfigError
from cogvit.model.config import CogViTConfig
from cogvit.model.naflex import naflex_grid
from cogvit.model.packing import Grid, pack_images, raster
from cogvit.model.vit import CogViT
from tools.bench._peers import PaddedBatch, TimmEncoder, TransformersEncoder
from tools.bench._record import run_benchmark

PATCH_PX = 16
PHOTOS_PX = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 375), (612, 612))
DOCUMENTS_PX = ((1240, 1754), (1654, 2339), (1920, 1080), (400, 1200), (1200, 300), (1754, 1240))


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    width: str = "768"
    depth: str = "12"
    heads: str = "12"
    mixes: str = "fit-256,fit-1024,native,mixed"
    precisions: str = "fp32,bf16"
    rounds: str = "3"
    batches: str = "2"
    device: str = "cpu"
    batch_scale: str = "1"
    out: str = ""


@dataclass(frozen=True)
class Mix:
    """Images of a kind."""

    name: str
    what: str
    batch_images: int
    target: float  # least speed of ours packed against the best peer in random order
    grid: Callable[[int, int, np.random.Generator], Grid]  # of an image of this height and width in px


def mixed_grid(height_px: int, width_px: int, rng: np.random.Generator) -> Grid:
    """Fit an image to a budget of its own: lognormal around 330 patches, from 64 to 1024."""
    budget = int(np.clip(np.exp(rng.normal(np.log(330), 0.8)), 64, 1024))
    return naflex_grid(height_px, width_px, PATCH_PX, budget)


MIXES = (
    Mix("fit-256", "every image fitted to 256 patches", 6, 1.0, lambda h, w, _: naflex_grid(h, w, PATCH_PX, 256)),
    Mix("fit-1024", "every image fitted to 1024 patches", 3, 1.1, lambda h, w, _: naflex_grid(h, w, PATCH_PX, 1024)),
    Mix(
        "native",
        "native sizes, at most 1024 patches",
        6,
        1.2,
        lambda h, w, _: naflex_grid(h, w, PATCH_PX, 1024, enlarge=False),
    ),
    Mix("mixed", "a budget of 64 to 1024 patches for each image", 8, 1.7, mixed_grid),
)


def draw_sizes(count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield heights and widths in px: photographs (60 %), web images of any size (25 %), screens and scans (15 %)."""
    for kind in rng.random(count):
        if kind < 0.6:
            yield PHOTOS_PX[rng.integers(len(PHOTOS_PX))]
        elif kind < 0.85:
            longer_px, aspect = np.clip(np.exp(rng.normal(np.log(420), 0.6)), 64, 2000), np.exp(rng.normal(0.1, 0.4))
            yield int(longer_px * min(aspect, 1.0)), int(longer_px / max(aspect, 1.0))
        else:
            yield DOCUMENTS_PX[rng.integers(len(DOCUMENTS_PX))]


def compared_shape(width: int, depth: int, heads: int) -> CogViTConfig:
    """Return the shape that all programs' encoders can have."""
    return CogViTConfig(
        image_size=256,
        patch_size=PATCH_PX,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        use_qk_norm=False,
        use_cls_token=False,
    )


class Image(NamedTuple):
    """One image of random pixels."""

    grid: Grid
    patches: Tensor  # [rows * columns, 3 * P * P] float


def draw_images(mix: Mix, count: int) -> list[Image]:
    """Return images of a mix; the same in every run."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    grids = [mix.grid(height_px, width_px, rng) for height_px, width_px in draw_sizes(count, rng)]
    return [Image(grid, torch.randn(grid[0] * grid[1], 3 * PATCH_PX**2, generator=generator)) for grid in grids]


@dataclass(frozen=True)
class Contender:
    """One way to encode the images of a mix; each step returns the features of one batch."""

    name: str
    model: nn.Module
    steps: Sequence[Callable[[], Tensor]]


def padded(images: Sequence[Image], device: torch.device) -> PaddedBatch:
    """Pad images to the longest, as the peers take them."""

    def rows(of_images: list[Tensor]) -> Tensor:
        return pad_sequence(of_images, batch_first=True).to(device)

    return PaddedBatch(
        patches_BNE=rows([image.patches for image in images]),
        place_BN2=rows([raster(*image.grid).long() for image in images]),
        valid_BN=rows([torch.ones(len(image.patches), dtype=torch.bool) for image in images]),
        grid_B2=torch.tensor([image.grid for image in images], device=device),
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def packed_step(model: CogViT, images: Sequence[Image]) -> Callable[[], Tensor]:
    """Encode images as one pack."""
    pack = pack_images([image.patches for image in images], [image.grid for image in images])
    pack = to_device(pack, device_of(model))
    return lambda: model.forward_packed(pack).patch_TD


def dense_step(model: CogViT, images: Sequence[Image]) -> Callable[[], Tensor]:
    """Encode images as one padded batch of sequences, as `naflex_collate` gives them."""
    batch = padded(images, device_of(model))
    x = torch.cat([batch.patches_BNE, batch.place_BN2], dim=2)
    return lambda: model(x, valid_mask=batch.valid_BN)["patch_tokens"]


def peer_step(model: nn.Module, images: Sequence[Image]) -> Callable[[], Tensor]:
    """Encode images with a peer."""
    batch = padded(images, device_of(model))
    return lambda: model(batch)


def contenders(
    images: Sequence[Image], batch_images: int, ours: CogViT, peers: Mapping[str, nn.Module]
) -> list[Contender]:
    """Return every way to encode the images, for our model and peers by their names."""
    batches = [images[i : i + batch_images] for i in range(0, len(images), batch_images)]
    by_length = sorted(images, key=lambda image: len(image.patches))
    bucketed = [by_length[i : i + batch_images] for i in range(0, len(images), batch_images)]
    ways = [
        Contender("ours, packed", ours, [packed_step(ours, batch) for batch in batches]),
        Contender("ours, padded batch", ours, [dense_step(ours, batch) for batch in batches]),
        Contender("ours, image by image", ours, [packed_step(ours, [image]) for image in images]),
    ]
    for name, peer in peers.items():
        ways.append(Contender(f"{name}, random order", peer, [peer_step(peer, batch) for batch in batches]))
        ways.append(Contender(f"{name}, by length", peer, [peer_step(peer, batch) for batch in bucketed]))
    return ways


class StepTime(NamedTuple):
    """CPU time of one pass over all images; on a GPU that of the clock."""

    forward_s: float
    forward_backward_s: float


def train_step(way: Contender, precision: str) -> StepTime:
    """Encode all images with the gradients of every weight."""
    way.model.zero_grad()
    device = device_of(way.model)
    forward_s, start_s = 0.0, now_s(device)
    for step in way.steps:
        step_s = now_s(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = step()
        forward_s += now_s(device) - step_s
        features.backward(torch.ones_like(features))
        del features
    return StepTime(forward_s, now_s(device) - start_s)


def _report_peak(way: Contender, precision: str, report: Connection) -> None:
    start_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_step(way, precision)
    report.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kb))


def peak_bytes(way: Contender, precision: str) -> int:
    """Return the peak memory of forward and backward above the weights and the input; on a CPU in a forked child."""
    if device_of(way.model).type == "cuda":
        way.model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        train_step(way, precision)
        return torch.cuda.max_memory_allocated() - before_bytes
    receive, send = get_context("fork").Pipe(duplex=False)
    child = get_context("fork").Process(target=_report_peak, args=(way, precision, send))
    child.start()
    send.close()
    peak: int = receive.recv()
    child.join()
    return peak


class Result(NamedTuple):
    """What was measured of one contender."""

    name: str
    time: StepTime  # medians
    peak_bytes: int


def measure(ways: Sequence[Contender], precision: str, rounds: int, peaks: Sequence[int]) -> list[Result]:
    """Run all contenders in turn, rounds beginning with different ones: each meets what the last left to malloc."""
    times: dict[str, list[StepTime]] = {way.name: [] for way in ways}
    for turn in range(rounds):
        first = turn * len(ways) // rounds
        for way in (*ways[first:], *ways[:first]):
            times[way.name].append(train_step(way, precision))
    medians = [StepTime(*map(statistics.median, zip(*runs, strict=True))) for runs in times.values()]
    return [Result(way.name, spent, peak) for way, spent, peak in zip(ways, medians, peaks, strict=True)]


def table(mix: Mix, images: Sequence[Image], precision: str, results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of one mix: every contender, then ours against the best of each kind."""
    lengths = sorted(len(image.patches) for image in images)
    tokens, ours = sum(lengths), results[0]
    yield f"### {mix.name}, {precision}: {mix.what}"
    yield ""
    yield (
        f"{len(images)} images in batches of {mix.batch_images}, {tokens} useful tokens,"
        f" {lengths[0]} to {lengths[-1]} an image."
    )
    yield ""
    yield "| encoder | forward, tokens/s | images/s | forward + backward, tokens/s | images/s | peak, MB |"
    yield "|---|---|---|---|---|---|"
    for name, (forward_s, both_s), peak in results:
        yield (
            f"| {name} | {tokens / forward_s:.0f} | {len(images) / forward_s:.2f} | {tokens / both_s:.0f}"
            f" | {len(images) / both_s:.2f} | {peak / 1e6:.0f} |"
        )
    yield ""
    for kind, wanted in (("random order", mix.target), ("by length", 1.0), ("image by image", 1.0)):
        rivals = [result for result in results if result.name.endswith(kind)]
        best = min(rivals, key=lambda result: result.time.forward_backward_s)
        speed = best.time.forward_backward_s / ours.time.forward_backward_s
        memory = ours.peak_bytes / min(result.peak_bytes for result in rivals)
        yield f"- packed against {best.name}: {speed:.2f}x the speed (wanted {wanted:.1f}x), {memory:.2f}x the memory"
    yield ""


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError for a flag that is no number or an unknown name."""
    names = arguments.mixes.split(",")
    mixes = [mix for mix in MIXES if mix.name in names]
    precisions = arguments.precisions.split(",")
    if len(mixes) != len(names) or not set(precisions) <= {"fp32", "bf16"}:
        legal = ", ".join(mix.name for mix in MIXES)
        raise ConfigError(
            f"--mixes {arguments.mixes} are of {legal}; --precisions {arguments.precisions} of fp32, bf16"
        )
    try:
        width, depth, heads = int(arguments.width), int(arguments.depth), int(arguments.heads)
        rounds, num_batches, scale = int(arguments.rounds), int(arguments.batches), int(arguments.batch_scale)
    except ValueError as error:
        raise ConfigError(
            f"--width, --depth, --heads, --rounds, --batches and --batch-scale are whole numbers: {error}"
        ) from error
    device = local_device(device_flag(arguments.device), Process())
    if find_spec("timm") is None:
        raise ConfigError("timm is not installed; make bench puts it into .venv/peers, which PYTHONPATH must name")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = compared_shape(width, depth, heads)
    ours, timm, transformers = (
        module.to(device) for module in (CogViT(cfg), TimmEncoder(cfg), TransformersEncoder(cfg))
    )
    assert isinstance(ours, CogViT)
    yield from heading(device, arguments)
    images = {mix: draw_images(mix, mix.batch_images * scale * num_batches) for mix in mixes}
    peers = {"timm": timm, "transformers": transformers}
    ways = {mix: contenders(images[mix], mix.batch_images * scale, ours, peers) for mix in mixes}
    runs = [(mix, precision) for precision in precisions for mix in mixes]
    # All memory first: what timed runs leave in the allocator would hide a child's first use of it.
    peaks = {(mix, precision): [peak_bytes(way, precision) for way in ways[mix]] for mix, precision in runs}
    for mix, precision in runs:
        results = measure(ways[mix], precision, rounds, peaks[mix, precision])
        yield from table(mix, images[mix], precision, results)


def now_s(device: torch.device) -> float:
    """Return this process's CPU time, or on a GPU, when its work is done, the time of the clock."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def heading(device: torch.device, arguments: Arguments) -> Iterator[str]:
    """Yield what a record begins with."""
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in vars(arguments).items() if name != "out"]
    on_gpu = device.type == "cuda"
    yield f"# Encoder speed and memory, {'a GPU' if on_gpu else 'one CPU thread'}"
    yield ""
    machine = device_name(device) if on_gpu else cpu_name()
    yield f"{date.today()}, `python -m tools.bench.encoder {' '.join(flags)}`; {machine};"
    yield ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers")) + "."
    yield ""


def cpu_name() -> str:
    """Return the processor's name as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
