"""Small corpora of conversations about pictures, with a language model for each, of which stage 3 can be timed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset import TarWriter

from cogvit import CausalLM, LanguageConfig
from cogvit.config import RunConfig
from configs import demo_stage3
from data_pipeline.index import build_index
from tools.demo_corpus import digits, pictograms, questions
from tools.demo_corpus.sample import encode
from tools.make_demo_language_model import tiny_shape, train_tokenizer

Members = dict[str, Any]  # of a sample, as webdataset names them
WORDS = (
    "red",
    "green",
    "small",
    "round",
    "one",
    "two",
    "left",
    "below",
    "near",
    "a",
    "the",
    "of",
    "is",
    "house",
    "tree",
)
EACH = 160  # samples of each source of the demo
TALKS = 384
UNIFORM_WORDS = 60
PATCH_PX = 8
LONGEST_TOKENS = 1024


@dataclass(frozen=True)
class Mix:
    """Samples of a kind, and the run that trains on them."""

    name: str
    what: str
    samples: Callable[[], Iterator[Members]]
    shape: Callable[[Any], LanguageConfig]  # of a tokenizer
    config: RunConfig  # without paths


def demo_samples() -> Iterator[Members]:
    """Yield pictograms, digits and questions about both, as `make demo` draws them."""
    train, _ = digits.split(0)
    for source in (
        pictograms.drawings(0, 0),
        digits.drawings(0, 0, train),
        questions.of_pictograms(pictograms.drawings(0, 1)),
        questions.of_digits(digits.drawings(0, 1, train)),
    ):
        for number, sample in enumerate(islice(source, EACH)):
            yield {**encode(sample), "__key__": f"{sample.source}{sample.question[:5].strip()}{number:04d}"}


def demo_shape(tokenizer: Any) -> LanguageConfig:
    """The demo's model as a Llama: transformers' GLM-4 does not know the rows and columns of image tokens."""
    return replace(tiny_shape(tokenizer), family="llama", rotary_fraction=1.0, mrope_section=None)


def small_shape(tokenizer: Any) -> LanguageConfig:
    """A Llama in SmolLM2's proportions, 5.9 million weights in its blocks."""
    eos_ids = tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>"]))
    return LanguageConfig(
        "llama", 4096, 256, 8, 8, 4, 32, 704, max_tokens=LONGEST_TOKENS, eps=1e-5, tied=True, eos_ids=eos_ids
    )


def talk(number: int, rng: np.random.Generator, sizes_px: list[tuple[int, int]], words: int) -> Members:
    """One question about some pictures, a third of the words, and its answer."""
    said = [str(word) for word in rng.choice(WORDS, words)]
    asked = max(words // 3, 1)
    content = "<image>" * len(sizes_px) + " ".join(said[:asked])
    turns = [("user", content), ("assistant", " ".join(said[asked:]))]
    members: Members = {"__key__": f"{number:05d}"}
    for place, size_px in enumerate(sizes_px):
        coarse, image = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(coarse).resize(size_px, Image.Resampling.BICUBIC).save(image, "PNG")
        members[f"{place}.png"] = image.getvalue()
    return members | {"json": json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()}


def conversations() -> Iterator[Members]:
    """Yield talks of lognormal length, median 90 words; a fifth have no picture, a sixth two to four."""
    rng = np.random.default_rng(0)
    for number in range(TALKS):
        pictures = int(rng.choice([0, 1, 2, 3, 4], p=[0.2, 0.63, 0.09, 0.05, 0.03]))
        sizes_px = [tuple((PATCH_PX * rng.integers(8, 17, 2)).tolist()) for _ in range(pictures)]
        yield talk(number, rng, sizes_px, int(np.clip(rng.lognormal(np.log(90), 1.0), 6, 800)))


def uniform() -> Iterator[Members]:
    """Yield talks of one length about one picture of one size each."""
    rng = np.random.default_rng(0)
    for number in range(TALKS):
        yield talk(number, rng, [(96, 96)], UNIFORM_WORDS)


def _config(batch: int, text_tokens: int, patches: int, slots: int) -> RunConfig:
    """The demo's run, on longer samples. text_tokens, patches and slots: of a pack."""
    base = demo_stage3.config()
    data = replace(
        base.data,
        mixture=(),
        global_batch_images=batch,
        tokens_per_pack=patches,
        images_per_pack=slots,
        text_tokens_per_pack=text_tokens,
        max_patches=256,
    )
    language = replace(base.language, max_tokens=min(LONGEST_TOKENS, text_tokens), max_patches=min(1024, patches))
    return replace(base, data=data, language=language)


MIXES = (
    Mix("demo", "the demo's captions and questions", demo_samples, demo_shape, demo_stage3.config()),
    Mix("conversations", "talks of lognormal length", conversations, small_shape, _config(32, 2048, 2048, 24)),
    Mix("uniform", "talks of one length", uniform, small_shape, _config(32, 840, 1152, 8)),
)


def write_mix(mix: Mix, directory: Path) -> RunConfig:
    """Write a mix's shard with its index, and its language model; returns the run."""
    shard, language = directory / "shards" / "all.tar", directory / "language"
    shard.parent.mkdir(parents=True)
    with TarWriter(str(shard), encoder=False, mtime=0) as tar:
        for members in mix.samples():
            tar.write(members)
    for _ in build_index(str(shard)):
        continue
    tokenizer = train_tokenizer([*[" ".join(WORDS)] * TALKS, *_captions()])  # so often that each word is a token
    torch.manual_seed(0)
    CausalLM(mix.shape(tokenizer)).save_pretrained(language)
    tokenizer.save_pretrained(language)
    return replace(
        mix.config,
        data=replace(mix.config.data, shards=str(shard), eval_shards=""),
        language=replace(mix.config.language, path=str(language)),
    )


def _captions() -> list[str]:
    """What the demo's tokenizer is trained on, but for the photographs."""
    train, _ = digits.split(0)
    drawn = [*pictograms.drawings(0, 0), *islice(digits.drawings(0, 0, train), EACH)]
    return [caption for sample in drawn for caption in (sample.caption_en, sample.caption_zh)]
