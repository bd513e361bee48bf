"""What visual experts are worth: beside an adapter alone and beside training the whole language model.

usage: python -m tools.experiments.expert [--run NAME] [flags]

--corpus DIR  what tools.make_demo_corpus wrote, indexed [runs/demo/corpus]
--init RUN    of stage 1 or 2, whose encoder all runs share and none trains [runs/demo/stage2]
--work DIR    boxes, language model, runs and figures; what is there is used again [runs/expert]
--run NAME    one part of it and no record: prepare or a run's name (--run list prints all in order)
--boxes N     drawn pictures to learn from; a tenth as many are held out [6000]
--language-steps N  of the language model that all runs begin with [240]
--steps N     of each run [160]
--out FILE    also write the record there, and beside it the curves as FILE with .svg for its suffix

A language model of four layers reads captions of pictograms and digits in two languages, and where boxes may lie, as
answers to questions about pictures that it does not see. Every run then shows it handwritten digits, whose captions it
is to say, and drawn boxes, whose places it is to name; only what is trained differs. Nothing that a run reads is a text
alone or a pictogram: the loss of a tenth of the captions of pictograms, which nothing has learned, says what it forgot.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cogvit import CausalLM
from cogvit.errors import ConfigError
from cogvit.model.boxes import Box, boxes_text
from cogvit.rl.families import COLORS, SIDE_PX
from data_pipeline.caption import parse_metadata
from data_pipeline.shards import expand_shards, read_members
from tools import index_shards
from tools.bench._record import flags_of, run_benchmark
from tools.experiments.commands import succeed
from tools.experiments.expert_record import Row, picture, record
from tools.experiments.expert_runs import KINDS, Found, Place, Run, make_run
from tools.experiments.interleaved import write_json
from tools.make_demo_language_model import QUESTIONS, encode, read_captions, tiny_shape, train, train_tokenizer
from tools.make_demo_tasks import Solved, write_shard

SEEDS = (0, 1, 2)
DEPTH = 4  # layers of the language model
PAPER = (245, 245, 240)  # behind boxes
STEP_PX, BOX_STEPS = 4, (3, 9)  # sides of boxes: 12 to 32 px
HELD_OUT_OF = 10  # every so many captions one is held out


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    corpus: str = "runs/demo/corpus"
    init: str = "runs/demo/stage2"
    work: str = "runs/expert"
    run: str = ""
    boxes: str = "6000"
    language_steps: str = "240"
    steps: str = "160"
    out: str = ""


def all_runs() -> list[Run]:
    """Return every run, seed by seed."""
    return [Run(kind, seed) for seed in SEEDS for kind in KINDS]


def prepare(place: Place, boxes: int, steps: int) -> None:
    """Draw boxes, index what runs read, and train the language model. Errors: ConfigError, DataError."""
    if not place.boxes.exists():
        held = boxes // 10
        write_shard(place.boxes / "heldout" / "tasks-00000.tar", [drawn(boxes + number) for number in range(held)])
        write_shard(place.boxes / "train" / "tasks-00000.tar", [drawn(number) for number in range(boxes)])
    for pattern in (place.shown, place.asked):
        succeed(index_shards.index_shards(index_shards.Arguments(pattern, str(place.index))))
    captions = read_captions(place.corpus)
    learned = {language: [one for n, one in enumerate(own) if n % HELD_OUT_OF] for language, own in captions.items()}
    held_out = {language: own[::HELD_OUT_OF] for language, own in captions.items()}
    pairs = [(QUESTIONS[language], own) for language, own in learned.items()]
    named = places_of(place.boxes)
    tokenizer = train_tokenizer([*(text for _, own in pairs for text in own), *named])
    samples = [sample for question, own in [*pairs, *named.items()] for sample in encode(tokenizer, question, own)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CausalLM(replace(tiny_shape(tokenizer), depth=DEPTH))
    train(model, samples, steps, 0)
    model.save_pretrained(place.language)
    tokenizer.save_pretrained(place.language)
    write_json(place.texts, held_out)


def drawn(seed: int) -> Solved:
    """Return a picture of one box, whose sides lie at multiples of a step, with the question where it is."""
    draw = np.random.default_rng(seed)
    width_px, height_px = (STEP_PX * draw.integers(*BOX_STEPS, 2)).tolist()
    left, top = (STEP_PX * int(draw.integers((SIDE_PX - side) // STEP_PX + 1)) for side in (width_px, height_px))
    box, data = Box(left, top, left + width_px, top + height_px), io.BytesIO()
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), PAPER)
    color = list(COLORS.values())[draw.integers(len(COLORS))]
    ImageDraw.Draw(image).rectangle((box.x0, box.y0, box.x1 - 1, box.y1 - 1), fill=color)
    image.save(data, "PNG")
    asked = {"role": "user", "content": "<image>Where is the box?"}
    said = {"role": "assistant", "content": boxes_text([box], SIDE_PX, SIDE_PX)}
    return Solved("boxes", [asked, said], [data.getvalue()])


def places_of(boxes: Path) -> dict[str, list[str]]:
    """Return the answers to each question about drawn boxes."""
    found: dict[str, list[str]] = {}
    for shard in expand_shards(str(boxes / "train" / "*.tar")):
        for member in read_members(shard):
            if member.name.endswith(".json"):
                asked, said = parse_metadata(member.data, "json")["messages"]
                found.setdefault(asked["content"].removeprefix("<image>"), []).append(said["content"])
    return found


def make(arguments: Arguments, name: str) -> None:
    """Make one part, unless it is there. Errors: ConfigError for a name that none has."""
    runs = {run.name: run for run in all_runs()}
    place = Place(Path(arguments.corpus), Path(arguments.init), Path(arguments.work))
    if name not in names():
        raise ConfigError(f"--run {name} is no part; --run list prints all")
    print(name, file=sys.stderr, flush=True)
    if name == "prepare" and not place.texts.exists():
        prepare(place, int(arguments.boxes), int(arguments.language_steps))
    elif name in runs and not place.found(runs[name]).exists():
        write_json(place.found(runs[name]), asdict(make_run(place, runs[name], int(arguments.steps))))


def names() -> list[str]:
    """Return the names of all parts, in order."""
    return ["prepare", *(run.name for run in all_runs())]


def read_rows(place: Place) -> list[Row]:
    """Return the results of all runs that are there, by kind."""
    rows: dict[str, list[Found]] = {}
    for run in all_runs():
        if (path := place.found(run)).exists():
            rows.setdefault(run.kind, []).append(Found(**json.loads(path.read_text())))
    return [Row(kind, tuple(found)) for kind, found in rows.items()]


def report(arguments: Arguments) -> Iterator[str]:
    """Make what is missing and yield the record line by line. Errors: ConfigError."""
    for name in ("boxes", "language_steps", "steps"):
        if not getattr(arguments, name).isdigit():
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be a whole number")
    torch.set_num_threads(1)
    if arguments.run == "list":
        yield from names()
        return
    for name in [arguments.run] if arguments.run else names():
        make(arguments, name)
    if arguments.run:
        return
    rows = read_rows(Place(Path(arguments.corpus), Path(arguments.init), Path(arguments.work)))
    yield f"{date.today()}, `python -m tools.experiments.expert {flags_of(arguments)}`; torch {version('torch')}, CPU."
    yield from record(rows)
    if arguments.out:
        Path(arguments.out).with_suffix(".svg").write_text(picture(rows))


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
