"""Asks a vision-language model about pictures; the answer appears as it is made.

usage: python -m cogvit.generate RUN_OR_EXPORT --prompt TEXT [--image FILE[,FILE...]] [flags]

RUN_OR_EXPORT is a run of stage 3, or a directory that VisionLanguageModel.from_pretrained reads: ours, or a GLM-OCR of
transformers.

--prompt TEXT         the question
--image FILE,...      pictures that stand before it
--max-new-tokens N    longest answer, in tokens (default: 256)
--temperature T       0 takes the most likely token, 1 draws as the model says (default: 0)
--top-p P             draws among the most likely tokens that have this much of the probability (default: 1)
--seed N              of the draws (default: 0)
--draft mtp|none      mtp lets heads propose tokens: the same answer in fewer passes, and how many (default: none)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.model.drafting import Drafted
from cogvit.model.generation import Sampling
from cogvit.training.joint import load_joint


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run_or_export: str
    prompt: str = ""
    image: str = ""
    max_new_tokens: str = "256"
    temperature: str = "0"
    top_p: str = "1"
    seed: str = "0"
    draft: str = "none"


def generate(arguments: Arguments) -> int:
    """Print the answer piece by piece; returns the exit status."""
    if not arguments.prompt:
        raise ConfigError("--prompt TEXT is needed: what to ask")
    if arguments.draft not in ("none", "mtp"):
        raise ConfigError(f"--draft {arguments.draft} must be mtp or none")
    sampling, drafted = _sampling(arguments), Drafted() if arguments.draft == "mtp" else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_joint(Path(arguments.run_or_export)).to(device)
    if model.tokenizer is None:
        raise ConfigError(f"{arguments.run_or_export} has no tokenizer; copy one beside the language model")
    images = [name for name in arguments.image.split(",") if name]
    parts: list[dict[str, Any]] = [{"type": "image", "image": Path(name)} for name in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": arguments.prompt}]}]
    if drafted is not None and model.language.mtp is None:
        raise ConfigError(f"--draft mtp: {arguments.run_or_export} has no heads; a run with --mmtp.depths trains them")
    try:
        for piece in model.stream(messages, sampling, drafted):
            print(piece, end="", flush=True)
    except ValueError as error:
        raise ConfigError(f"--max-new-tokens {sampling.max_new_tokens}: {error}") from None
    print()
    if drafted is not None:
        print(drafted, file=sys.stderr)
    return 0


def _sampling(arguments: Arguments) -> Sampling:
    """How to draw. Errors: ConfigError names the flag."""
    numbers: dict[str, Any] = {}
    kinds: dict[str, type[int | float]] = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
    for name, kind in kinds.items():
        try:
            numbers[name] = kind(getattr(arguments, name))
        except ValueError:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {getattr(arguments, name)} must be a number") from None
    try:
        return Sampling(**numbers)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from None


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, generate))
