"""Asks a vision-language model about pictures and videos; the answer appears as it is made.

usage: python -m cogvit.generate RUN_OR_EXPORT --prompt TEXT [--image FILE[,FILE...]] [--video FILE] [flags]

RUN_OR_EXPORT is a run of stage 3, or a directory that VisionLanguageModel.from_pretrained reads: ours, a GLM-OCR of
transformers, or a released CogVLM, CogVLM2, CogAgent or GLM-4V-9B.

--prompt TEXT         the question
--image FILE,...      pictures that stand before it, of CogVLM and its family before all of the conversation
--video FILE          mp4, avi or webm that stands behind the pictures, as frames with their times
--history FILE        what was said before: a JSON list of {"role": "user" or "assistant", "content": TEXT}
--template NAME       how CogVLM's family is asked: base, chat, vqa; of CogAgent chat_old too, of GLM-4V base and chat
                      (default: as released)
--dtype NAME          of the weights, fp32 or bf16 (default: fp32)
--max-new-tokens N    longest answer, in tokens (default: 256)
--temperature T       0 takes the most likely token, 1 draws as the model says (default: 0)
--top-p P             draws among the most likely tokens that have this much of the probability (default: 1)
--seed N              of the draws (default: 0)
--draft mtp|none      mtp lets heads propose tokens: the same answer in fewer passes, and how many (default: none)
--device KIND         auto, cuda or cpu; auto is a GPU where there is one (default: auto)
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvit.config.arguments import run_command
from cogvit.config.device import device_flag, local_device
from cogvit.config.environment import this_process
from cogvit.errors import ConfigError
from cogvit.model.drafting import Drafted
from cogvit.model.generation import Sampling
from cogvit.model.questions import TEMPLATES, Questions, Template
from cogvit.model.vlm import VisionLanguageModel
from cogvit.training.joint import load_joint


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run_or_export: str
    prompt: str = ""
    image: str = ""
    video: str = ""
    history: str = ""
    template: str = ""
    dtype: str = "fp32"
    max_new_tokens: str = "256"
    temperature: str = "0"
    top_p: str = "1"
    seed: str = "0"
    draft: str = "none"
    device: str = "auto"


def generate(arguments: Arguments) -> int:
    """Print the answer piece by piece; returns the exit status."""
    if not arguments.prompt:
        raise ConfigError("--prompt TEXT is needed: what to ask")
    if arguments.draft not in ("none", "mtp"):
        raise ConfigError(f"--draft {arguments.draft} must be mtp or none")
    sampling, drafted = _sampling(arguments), Drafted() if arguments.draft == "mtp" else None
    before, device = _history(arguments.history), local_device(device_flag(arguments.device), this_process())
    model = load_joint(Path(arguments.run_or_export), arguments.dtype).to(device)
    if arguments.template:
        model.questions = _questions(model, arguments.template)
    if model.tokenizer is None:
        raise ConfigError(f"{arguments.run_or_export} has no tokenizer; copy one beside the language model")
    images = _images(arguments.image)
    parts: list[dict[str, Any]] = [{"type": "image", "image": Path(name)} for name in images]
    parts += [{"type": "video", "video": arguments.video}] if arguments.video else []
    messages = [*before, {"role": "user", "content": [*parts, {"type": "text", "text": arguments.prompt}]}]
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


def _images(files: str) -> list[str]:
    """The pictures' files; a name may hold commas where it is the only one."""
    return [files] if Path(files).is_file() else [name for name in files.split(",") if name]


def _history(file: str) -> list[dict[str, Any]]:
    """Earlier messages. Errors: ConfigError names the file."""
    if not file:
        return []
    try:
        said = json.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--history {file} cannot be read: {error}") from None
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        raise ConfigError(f'--history {file} must be a list of {{"role": ..., "content": ...}}')
    return said


def _questions(model: VisionLanguageModel, template: str) -> Questions:
    """How to ask. Errors: ConfigError names the flag."""
    if model.questions is None:
        raise ConfigError(f"--template {template} is of the CogVLM family; this model has a chat template")
    known: dict[str, Template] = {name: name for name in TEMPLATES}
    if template not in known:
        raise ConfigError(f"--template {template} is unknown; expected one of {', '.join(known)}")
    try:
        return replace(model.questions, template=known[template])
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


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
