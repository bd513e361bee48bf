"""What heads for more tokens cost a training step of stage 3: time and memory beside a step without them.

usage: python -m tools.bench.heads [flags]
  --demo DIR       what make demo left: its corpus and language model [runs/demo]
  --rounds 5       each round runs every contender once; the table has medians
  --out FILE       also write the record there

One process of one thread, fp32, AdamW, everything trained: the demo's stage 3, on the packs of its first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from cogvit.config import RunConfig
from cogvit.errors import ConfigError
from cogvit.model.config import MmtpConfig
from cogvit.parallel.mesh import Mesh
from cogvit.stages import build
from cogvit.training.engine import Engine
from configs import demo_stage3
from data_pipeline.index import load_index
from data_pipeline.loader import step_loader
from data_pipeline.topology import Seat
from tools.bench._probe import Probe
from tools.bench._ranks import busiest, join, on_ranks, take_turns
from tools.bench._record import flags_of, run_benchmark

NONE = "no heads"
HEADS = {
    NONE: MmtpConfig(),
    "1 depth": MmtpConfig(1),
    "3 depths, shared": MmtpConfig(3),
    "3 depths, their own": MmtpConfig(3, share=False),
    "3 depths, shared, see embeddings": MmtpConfig(3, images="embeddings"),
    "3 depths, shared, images masked": MmtpConfig(3, images="masked"),
}


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    demo: str = "runs/demo"
    rounds: str = "5"
    out: str = ""


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        probes: of each contender's steps.
        parameters: how many each trains.
        packs: of a step.
    """

    probes: dict[str, list[Probe]]
    parameters: dict[str, int]
    packs: int


def demo_config(demo: Path) -> RunConfig:
    """Return the demo's stage 3 where its corpus and language model lie."""
    config = demo_stage3.config()
    data = replace(config.data, shards=str(demo / "corpus/train*/*.tar"), eval_shards="")
    return replace(config, data=data, language=replace(config.language, path=str(demo / "language")))


def start(config: RunConfig, mesh: Mesh) -> tuple[Callable[[], None], int, int]:
    """Return a step, how many parameters it trains, and its packs."""
    model, objective = build(config, mesh, {})
    engine = Engine(model, config, mesh)
    loader = step_loader(load_index(config.data.shards), config, reads="conversations")
    micro = loader.step(Seat(0, 1, range(config.data.canonical_shares)), 0).micro

    def step() -> None:
        engine.step(objective, micro, 200)

    return step, sum(parameter.numel() for parameter in model.parameters()), len(micro)


def measure(rank: int, rendezvous: str, config: RunConfig, rounds: int) -> Found:
    """Run all contenders in turn."""
    mesh = join(rank, 1, rendezvous)
    steps, parameters, packs = {}, {}, 0
    for name, mmtp in HEADS.items():
        steps[name], parameters[name], packs = start(replace(config, mmtp=mmtp), mesh)
        steps[name]()
    return Found(take_turns(steps, rounds), parameters, packs)


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError for a flag that is no number, or a demo that is not there."""
    if not (arguments.rounds.isdigit() and int(arguments.rounds)):
        raise ConfigError(f"--rounds {arguments.rounds} must be a whole number above 0")
    demo = Path(arguments.demo)
    if not (demo / "corpus").is_dir() or not (demo / "language").is_dir():
        raise ConfigError(f"--demo {demo} has no corpus and language model; make demo writes them")
    config = demo_config(demo)
    (found,) = on_ranks(partial(measure, config=config, rounds=int(arguments.rounds)), 1)
    data = config.data
    yield "# A step of stage 3 with heads for more tokens, on CPU"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.heads {flags_of(arguments)}`; torch {version('torch')}, deepspeed"
    yield f"{version('deepspeed')}, megatron-core {version('megatron-core')}; one process of one thread, fp32."
    yield f"{found.packs} packs of {data.text_tokens_per_pack} tokens. The peak is above what is held between steps."
    yield ""
    yield "| step | parameters | CPU s | beside none | peak MiB | beside none |"
    yield "|---|---|---|---|---|---|"
    none = busiest([found.probes], NONE)
    for name in HEADS:
        one = busiest([found.probes], name)
        yield (
            f"| {name} | {found.parameters[name]:,} | {one.cpu_s:.2f} | {one.cpu_s / none.cpu_s:.2f}"
            f" | {one.peak_bytes / 2**20:,.0f} | {one.peak_bytes / none.peak_bytes:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
