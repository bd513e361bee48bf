"""What a training step of stage 3 costs beside a bare loop of a transformers language model that pads, on a CPU.

usage: python -m tools.bench.language [flags]
  --mixes demo,conversations,uniform
  --batches 2      steps of a run of each contender, on batches of their own
  --rounds 5       each round runs every contender once; the table has the medians
  --out FILE       also write the record there

One process of one thread, fp32, AdamW, clipping; encoder, adapter and language model are all trained. Both see the same
samples, as the data plane gives them, and begin with the same weights, so their first losses are equal. Ours packs a
batch as the run would; the loop pads it in as many microbatches as ours has packs, in random order or by length, with
sdpa, a mask where there is padding, and its head on the labels that count. Its encoder and adapter are our plain ones,
which do not pad: what differs is padding in the language model, and what each does around the passes. Useful tokens
leave padding out. CPU seconds, which a busy neighbor distorts less than a clock does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch

from cogvit.batch import Batch
from cogvit.config import RunConfig
from cogvit.errors import ConfigError
from cogvit.model.adapter import fitted_adapter
from cogvit.model.layouts.causal_lm import read_shape
from cogvit.model.vit import CogViT
from cogvit.parallel.mesh import Mesh
from cogvit.stages import build
from cogvit.training.engine import Engine
from data_pipeline.index import load_index
from data_pipeline.loader import step_loader
from data_pipeline.topology import Seat
from tools.bench._padded_loop import BareModel, PaddedBatch, Sample, bare_loss, bare_step, padded, samples_of
from tools.bench._probe import Probe
from tools.bench._ranks import busiest, join, on_ranks, take_turns
from tools.bench._record import flags_of, run_benchmark
from tools.bench._talks import MIXES, Mix, write_mix

OURS, RANDOM, BY_LENGTH = "CogViT, packed", "bare loop, random order", "bare loop, by length"


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    mixes: str = "demo,conversations,uniform"
    batches: str = "2"
    rounds: str = "5"
    out: str = ""


@dataclass(frozen=True)
class Found:
    """What was measured of a mix."""

    probes: dict[str, list[Probe]]
    rows: dict[str, int]  # language tokens that a contender computes, padding included
    losses: dict[str, float]  # before the first step, in nats a label
    useful_tokens: int
    longest: int


def read_steps(config: RunConfig, batches: int) -> list[tuple[Batch, ...]]:
    """Return the packs of a run's first steps on one rank."""
    loader = step_loader(load_index(config.data.shards), config, reads="conversations")
    seat = Seat(0, 1, range(config.data.canonical_shares))
    return [loader.step(seat, step).micro for step in range(batches)]


def microbatches(samples: Sequence[Sample], count: int) -> list[PaddedBatch]:
    """Pad samples in so many microbatches of equal size, in their order."""
    bounds = [len(samples) * part // count for part in range(count + 1)]
    return [padded(samples[start:stop]) for start, stop in pairwise(bounds)]


def start_ours(
    config: RunConfig, mesh: Mesh, steps: Sequence[tuple[Batch, ...]]
) -> tuple[Engine, float, Callable[[], None]]:
    """Return the engine, the first step's loss before it, and what runs the steps."""
    model, objective = build(config, mesh, {})
    engine = Engine(model, config, mesh)
    loss = engine.evaluate(objective, steps[0])["loss"]

    def run() -> None:
        for micro in steps:
            engine.step(objective, micro, 200)

    return engine, loss, run


def start_bare(
    engine: Engine, config: RunConfig, steps: Sequence[list[PaddedBatch]]
) -> tuple[float, Callable[[], None]]:
    """Return the first step's loss with the engine's weights, and what runs the steps."""
    path = Path(config.language.path)
    vision = CogViT(config.vision)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, read_shape(path))
    own = {name.removeprefix("master/"): tensor.clone() for name, tensor in engine.plain_state() if "master/" in name}
    for part, module in (("vision.", vision), ("adapter.", adapter)):
        module.load_state_dict({n.removeprefix(part): x for n, x in own.items() if n.startswith(part)}, strict=False)
    model = BareModel(vision, adapter, path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def run() -> None:
        for micro in steps:
            bare_step(model, optimizer, micro)

    return bare_loss(model, steps[0]), run


def compare(rank: int, rendezvous: str, config: RunConfig, batches: int, rounds: int) -> Found:
    """Run ours and the bare loop in turn, the loop on two orders of the samples."""
    mesh, pool = join(rank, 1, rendezvous), config.adapter.spatial_pool
    packs = read_steps(config, batches)
    drawn = torch.Generator().manual_seed(0)
    orders: dict[str, list[list[PaddedBatch]]] = {RANDOM: [], BY_LENGTH: []}
    useful_tokens, longest = 0, 0
    for micro in packs:
        samples = [sample for batch in micro for sample in samples_of(batch, pool)]
        lengths = [len(sample.ids) for sample in samples]
        useful_tokens, longest = useful_tokens + sum(lengths), max(longest, *lengths)
        mixed = [samples[place] for place in torch.randperm(len(samples), generator=drawn).tolist()]
        orders[RANDOM].append(microbatches(mixed, len(micro)))
        orders[BY_LENGTH].append(microbatches(sorted(samples, key=lambda one: len(one.ids)), len(micro)))
    engine, loss, run = start_ours(config, mesh, packs)
    runs, losses = {OURS: run}, {OURS: loss}
    held = [batch.sequence for micro in packs for batch in micro]
    rows = {OURS: sum(len(sequence.ids) for sequence in held if sequence is not None)}
    for name, steps in orders.items():
        losses[name], runs[name] = start_bare(engine, config, steps)
        rows[name] = sum(batch.ids_BS.numel() for micro in steps for batch in micro)
    for run in runs.values():
        run()
    return Found(take_turns(runs, rounds), rows, losses, useful_tokens, longest)


def mix_lines(mix: Mix, batches: int, rounds: int) -> Iterator[str]:
    """Yield the table of a mix."""
    with tempfile.TemporaryDirectory() as scratch:
        config = write_mix(mix, Path(scratch))
        run = partial(compare, config=config, batches=batches, rounds=rounds)
        (found,) = on_ranks(run, 1)
        vision, shape = config.vision, read_shape(Path(config.language.path))
    images = config.data.global_batch_images * batches
    mean = found.useful_tokens / images
    yield f"{mix.name}: {mix.what}; {images} samples of {mean:.0f} tokens on average, the longest {found.longest};"
    yield f"{shape.family} of {shape.depth} x {shape.embed_dim}, vocabulary {shape.vocab_size:,}; encoder of"
    yield f"{vision.depth} x {vision.embed_dim}."
    yield ""
    yield "| step | loss before | CPU s | useful tokens per CPU s | ours against it | rows that are useful | peak MiB |"
    yield "|---|---|---|---|---|---|---|"
    times = {name: busiest([found.probes], name) for name in found.probes}
    for name, one in times.items():
        yield (
            f"| {name} | {found.losses[name]:.5f} | {one.cpu_s:.2f} | {found.useful_tokens / one.cpu_s:,.0f}"
            f" | {one.cpu_s / times[OURS].cpu_s:.2f} | {found.useful_tokens / found.rows[name]:.0%}"
            f" | {one.peak_bytes / 2**20:,.0f} |"
        )
    yield ""


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError for an unknown mix or a flag that is no number."""
    known = {mix.name: mix for mix in MIXES}
    asked = arguments.mixes.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"--mixes {unknown[0]} is none of {', '.join(known)}")
    if not all(value.isdigit() and int(value) for value in (arguments.batches, arguments.rounds)):
        raise ConfigError("--batches and --rounds are whole numbers above 0")
    yield "# The step of stage 3 beside a bare loop that pads, on CPU"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.language {flags_of(arguments)}`; torch {version('torch')},"
    yield f"transformers {version('transformers')}, deepspeed {version('deepspeed')}, megatron-core"
    yield f"{version('megatron-core')}; one process of one thread, fp32."
    yield ""
    for name in asked:
        yield from mix_lines(known[name], int(arguments.batches), int(arguments.rounds))


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
