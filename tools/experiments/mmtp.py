"""What should heads for more tokens see where an image stands? Every option trained on the demo corpus, three seeds.

Usage: python -m tools.experiments.mmtp [--run NAME] [flags]
  --work DIR      corpus, models and results; what is there is used again [runs/mmtp]
  --run NAME      one part of it and no record: prepare, base_SEED or a run's name (--run list prints all in order)
  --encoder RUN   a run of stage 1 or 2 of the demo, whose encoder the bases keep; without it they learn one
  --base-steps N  of the model that all runs of a seed start from [600]
  --steps N       of each run [150]
  --out FILE      also write the record there, and beside it the curves as FILE with .svg for its suffix

A base is trained for each seed: encoder, adapter and a GLM-4 of 4 layers, on the next token of interleaved
texts (`interleaved.py`). Its encoder then stands still and its features are kept; every run begins from the
same base with new heads and sees the same batches. `joint` runs train language model, adapter and heads together, as
stage 3 does, beside a control without heads; `alone` runs train heads alone, behind a language model that stands, so
that all options answer the same question. Held-out losses are in nats a label over the same labels for every option.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from cogvit import VisionLanguageModel
from cogvit.errors import ConfigError
from cogvit.model.config import SEEN_AT_IMAGES
from cogvit.model.pretrained import load_tokenizer
from cogvit.training.restore import load_towers
from tools.bench._record import flags_of, run_benchmark
from tools.experiments.heads import Course, Found, Run, train_base, train_heads
from tools.experiments.interleaved import (
    HELD_OUT,
    TRAIN,
    Pictures,
    features_of,
    make_tokenizer,
    read_pictures,
    write_json,
)
from tools.experiments.mmtp_record import Row, picture, record

SEEDS = (0, 1, 2)
DEPTH = 4  # layers of the language model
HELD_OUT_OF_SHARD = 400
EVERY = 4  # steps of a point of the curves


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    work: str = "runs/mmtp"
    run: str = ""
    encoder: str = ""
    base_steps: str = "600"
    steps: str = "150"
    out: str = ""


def all_runs() -> list[Run]:
    """Return every run: the options first, in all seeds, then heads of their own, other K and heads alone."""
    groups = [
        [Run(depths=0), *(Run(images) for images in SEEN_AT_IMAGES)],
        [Run(images, share=False) for images in SEEN_AT_IMAGES],
        [Run("tokens", tokens) for tokens in (1, 16)],
        [Run(images, joint=False) for images in SEEN_AT_IMAGES],
    ]
    return [replace(run, seed=seed) for kinds in groups for seed in SEEDS for run in kinds]


def prepare(work: Path) -> None:
    """Train the tokenizer and keep the pictures as pixels. Errors: ConfigError when there is no corpus."""
    corpus = work / "corpus"
    if not corpus.is_dir():
        raise ConfigError(f"--work {work} has no corpus; python -m tools.make_demo_corpus --out {corpus} makes it")
    tokenizer = make_tokenizer(corpus, work / "tokenizer")
    read_pictures(str(corpus / TRAIN), tokenizer).save(work / "train.safetensors")
    read_pictures(str(corpus / HELD_OUT), tokenizer, HELD_OUT_OF_SHARD).save(work / "heldout.safetensors")


def make_base(work: Path, seed: int, steps: int, encoder: str) -> None:
    """Train a seed's base and keep it with its features of all pictures."""
    train, held_out = (Pictures.load(work / f"{name}.safetensors") for name in ("train", "heldout"))
    base = work / f"base_{seed}"
    vision = load_towers(Path(encoder)).vision if encoder else None
    course = Course(len(train.grids), steps, seed)
    model = train_base(train, load_tokenizer(work / "tokenizer"), DEPTH, course, vision)
    model.save_pretrained(base)
    features_of(model, train).save(base / "train.safetensors")
    features_of(model, held_out).save(base / "heldout.safetensors")


def make_run(work: Path, run: Run, steps: int) -> None:
    """Train heads and keep them with what they reached."""
    base = work / f"base_{run.seed}"
    train, held_out = (Pictures.load(base / f"{name}.safetensors") for name in ("train", "heldout"))
    trained = train_heads(run, VisionLanguageModel.from_pretrained(base), train, held_out, steps)
    trained.model.save_pretrained(work / run.name)
    write_json(work / f"{run.name}.json", asdict(trained.found))


def names() -> list[str]:
    """Return the names of all parts, in order."""
    return ["prepare", *(f"base_{seed}" for seed in SEEDS), *(run.name for run in all_runs())]


def make(work: Path, name: str, base_steps: int, steps: int, encoder: str = "") -> None:
    """Make one part, unless it is there. Errors: ConfigError for a name that none has."""
    runs = {run.name: run for run in all_runs()}
    if name not in names():
        raise ConfigError(f"--run {name} is no part; --run list prints all")
    print(name, file=sys.stderr, flush=True)
    if name == "prepare" and not (work / "heldout.safetensors").exists():
        prepare(work)
    elif name.startswith("base_") and not (work / name / "heldout.safetensors").exists():
        make_base(work, int(name.removeprefix("base_")), base_steps, encoder)
    elif name in runs and not (work / f"{name}.json").exists():
        make_run(work, runs[name], steps)


def read_rows(work: Path) -> list[Row]:
    """Return the results of all runs that are there, by kind."""
    rows: dict[str, list[Found]] = {}
    for run in all_runs():
        if (path := work / f"{run.name}.json").exists():
            rows.setdefault(run.kind, []).append(Found(**json.loads(path.read_text())))
    return [Row(kind, tuple(found)) for kind, found in rows.items()]


def report(arguments: Arguments) -> Iterator[str]:
    """Make what is missing and yield the record line by line. Errors: ConfigError."""
    if not (arguments.base_steps.isdigit() and arguments.steps.isdigit()):
        raise ConfigError("--base-steps and --steps are whole numbers")
    torch.set_num_threads(1)
    work, base_steps, steps = Path(arguments.work), int(arguments.base_steps), int(arguments.steps)
    if arguments.run == "list":
        yield from names()
        return
    for name in [arguments.run] if arguments.run else names():
        make(work, name, base_steps, steps, arguments.encoder)
    if arguments.run:
        return
    rows = read_rows(work)
    yield f"{date.today()}, `python -m tools.experiments.mmtp {flags_of(arguments)}`; torch {version('torch')}, CPU."
    yield from record(rows)
    if arguments.out:
        Path(arguments.out).with_suffix(".svg").write_text(picture(rows))


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
