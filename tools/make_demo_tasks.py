"""Writes what the demo of stage 4 begins with: right answers to its tasks as conversations, and a language model.

usage: python -m tools.make_demo_tasks --out DIR [--tasks NAME,...] [--samples N] [--seed N]

DIR/train and DIR/heldout hold webdataset shards of drawn episodes with their right answers; DIR/language holds a tiny
language model of random weights with a tokenizer of the words that occur. No episode is one that stage 4 asks.

--out DIR         new directory
--tasks NAME,...  of `cogvit.rl.families` (default: digits,counting,reading)
--samples N       to train on; a fiftieth as many are held out (default: 36000)
--seed N          of episodes and weights (default: 0)
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from webdataset import TarWriter

from cogvit import CausalLM, LanguageConfig
from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.model.boxes import boxes_text
from cogvit.rl.families import FAMILIES, SIDE_PX
from cogvit.rl.task import Task
from tools.make_demo_language_model import tiny_shape, train_tokenizer

_FIRST_EPISODE = 1 << 31  # stage 4 asks those below it
_HELD_OUT = 0.02


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: str = ""
    tasks: str = "digits,counting,reading"
    samples: str = "36000"
    seed: str = "0"


@dataclass(frozen=True)
class Solved:
    """An episode with its right answers.

    Attributes:
        source: of its task.
        messages: as a sample's json has them, `<image>` where an image stands.
        images: in order, as PNG.
    """

    source: str
    messages: list[dict[str, str]]
    images: list[bytes]


def make(arguments: Arguments) -> int:
    """Write shards and model; returns the exit status."""
    out = Path(arguments.out)
    if not arguments.out:
        raise ConfigError("--out DIR is needed: a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; choose a new directory")
    for name in ("samples", "seed"):
        if not getattr(arguments, name).isdigit():
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be a whole number")
    names = arguments.tasks.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise ConfigError(f"--tasks {unknown[0]} is unknown; tasks are {', '.join(FAMILIES)}")
    count, seed = int(arguments.samples), int(arguments.seed)
    first = _FIRST_EPISODE + seed * 10 * count
    held = max(1, int(count * _HELD_OUT))
    solved = [solve(FAMILIES[names[n % len(names)]](), first + n) for n in range(count + held)]
    write_shard(out / "train" / "tasks-00000.tar", solved[:count])
    write_shard(out / "heldout" / "tasks-00000.tar", solved[count:])
    write_language_model(out / "language", solved, seed)
    print(f"{out}: {count} episodes of {', '.join(names)} with their answers, {held} of them held out beside")
    return 0


def solve(task: Task, seed: int) -> Solved:
    """Play an episode with right answers alone."""
    said, images = list[dict[str, str]](), list[bytes]()
    follows: Sequence[Any] | None = task.reset(seed)
    while follows is not None:
        for message in follows:
            text = ""
            for part in message["content"]:
                text += "<image>" if part["type"] == "image" else part["text"]
                images += [_png(part["image"])] if part["type"] == "image" else []
            said.append({"role": message["role"], "content": text})
        answer = right_answer(task)
        said.append({"role": "assistant", "content": answer})
        follows = task.step(answer)
    return Solved(task.source, said, images)


def right_answer(task: Any) -> str:
    """Return what a family's task wants to hear now."""
    match task.source:
        case "grounding":
            return boxes_text([task.truth], SIDE_PX, SIDE_PX)
        case "drawing":
            return "; ".join(f"{color} {row} {column}" for (row, column), color in task.truth.items())
        case "clicking":
            x, y = (task.target.x0 + task.target.x1) / 2, (task.target.y0 + task.target.y1) / 2
            return f"[[{int(x / SIDE_PX * 1000):03},{int(y / SIDE_PX * 1000):03}]]"
    return str(task.truth)


def write_shard(path: Path, solved: Sequence[Solved]) -> None:
    """Write episodes as one shard; equal ones give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as shard:
        for number, one in enumerate(solved):
            images = {f"{place}.png": png for place, png in enumerate(one.images)}
            talk = json.dumps({"source": one.source, "messages": one.messages}).encode()
            shard.write({"__key__": f"{one.source}{number:06d}", **images, "json": talk})


def write_language_model(out: Path, solved: Sequence[Solved], seed: int) -> None:
    """Write a model of two layers with random weights, and a tokenizer of what is asked; answers it spells."""
    asked = [message["content"] for one in solved for message in one.messages if message["role"] == "user"]
    tokenizer = train_tokenizer(list(dict.fromkeys(text.replace("<image>", "") for text in asked)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CausalLM(small_shape(tokenizer))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def small_shape(tokenizer: Any) -> LanguageConfig:
    """Return the demo's shape with two of its layers: stage 4 speaks one token at a time."""
    return replace(tiny_shape(tokenizer), depth=2)


def _png(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, make))
