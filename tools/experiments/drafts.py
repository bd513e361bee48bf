"""Do drafts leave greedy answers as they are, and what do they save? Captions of held-out pictures, with and without.

Usage: python -m tools.experiments.drafts --model DIR [flags]
  --model DIR    what a run of tools.experiments.mmtp left, which has heads
  --corpus DIR   the demo corpus [runs/mmtp/corpus]
  --prompts 200  half of them one picture, half two with the first one's caption between them
  --rounds 3     each asks every prompt with drafts and without, the one that comes first changing
  --out FILE     also write the record there

Seconds are of the process, those of encoder and prompt left out: from the first token of an answer to its end.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvit import VisionLanguageModel
from cogvit.errors import ConfigError
from cogvit.model.drafting import Drafted
from cogvit.model.generation import Sampling
from data_pipeline.shards import expand_shards
from tools.bench._record import flags_of, run_benchmark
from tools.experiments.heads import LONGEST_ANSWER
from tools.experiments.interleaved import END, HELD_OUT, Shown, read_shown

Message = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    model: str = ""
    corpus: str = "runs/mmtp/corpus"
    prompts: str = "200"
    rounds: str = "3"
    out: str = ""


@dataclass(frozen=True)
class Prompt:
    """A conversation, and what would be right."""

    messages: list[Message]
    right: str


@dataclass(frozen=True)
class Answer:
    """What was said, and the seconds from its first token to its end."""

    text: str
    seconds: float


def prompts_of(corpus: Path, count: int) -> list[Prompt]:
    """Return prompts about held-out pictures of all shards in turn, each picture once. Errors: DataError."""
    shards = [read_shown(shard) for shard in expand_shards(str(corpus / HELD_OUT))]
    pictures = islice((shown for together in zip(*shards, strict=False) for shown in together), count * 3 // 2)
    prompts = []
    for number in range(count):
        shown = list(islice(pictures, 1 + number % 2))
        parts: list[dict[str, Any]] = [image_part(shown[-1])]
        if len(shown) > 1:
            parts = [image_part(shown[0]), {"type": "text", "text": shown[0].caption + END}, *parts]
        prompts.append(Prompt([{"role": "user", "content": parts}], shown[-1].caption))
    return prompts


def image_part(shown: Shown) -> dict[str, Any]:
    """Return a picture as a part of a message."""
    return {"type": "image", "image": Image.open(io.BytesIO(shown.data)).convert("RGB")}


def ask(model: VisionLanguageModel, messages: list[Message], drafted: Drafted | None) -> Answer:
    """Ask greedily, with drafts where they are counted."""
    pieces = model.stream(messages, Sampling(LONGEST_ANSWER), drafted)
    first = next(pieces)
    start_s = time.process_time()
    rest = "".join(pieces)
    return Answer(first + rest, time.process_time() - start_s)


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: ConfigError, CheckpointError, DataError."""
    if not (arguments.prompts.isdigit() and arguments.rounds.isdigit() and int(arguments.rounds)):
        raise ConfigError("--prompts and --rounds are whole numbers")
    if not arguments.model:
        raise ConfigError("--model DIR is needed: what a run of tools.experiments.mmtp left")
    torch.set_num_threads(1)
    model = VisionLanguageModel.from_pretrained(arguments.model)
    if model.language.mtp is None:
        raise ConfigError(f"{arguments.model} has no heads to draft with")
    prompts = prompts_of(Path(arguments.corpus), int(arguments.prompts))
    rates: dict[str, list[float]] = {"alone": [], "drafts": []}
    equal, right, counted = 0, 0, Drafted()
    for turn in range(int(arguments.rounds)):
        spent, counted, equal, right = dict.fromkeys(rates, 0.0), Drafted(), 0, 0
        for number, prompt in enumerate(prompts):
            names = ("alone", "drafts") if (turn + number) % 2 else ("drafts", "alone")
            said = {name: ask(model, prompt.messages, counted if name == "drafts" else None) for name in names}
            equal += said["alone"].text == said["drafts"].text
            right += said["alone"].text == prompt.right
            for name, answer in said.items():
                spent[name] += answer.seconds
        for name, seconds in spent.items():
            rates[name].append(counted.tokens / seconds)
    alone, drafts = (statistics.median(rates[name]) for name in ("alone", "drafts"))
    ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(rates["alone"], rates["drafts"], strict=True))
    yield f"{date.today()}, `python -m tools.experiments.drafts {flags_of(arguments)}`; torch {version('torch')}, CPU."
    yield f"Greedy texts that are the same: {equal} of {len(prompts)}. {str(counted).capitalize()}."
    yield f"Captions that are right to the letter: {right}, half of the pictures being digits."
    yield f"Tokens a CPU second behind the first: {alone:.0f} alone, {drafts:.0f} with drafts; rounds: {ratios} times."


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
