"""Shards of captions and conversations, and a run of stage 3 on them with a tiny language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LanguageTowerConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    to_json,
)
from cogvit.model.config import CogViTConfig
from data_pipeline.index import Index, build_index, load_index
from tests.data.corpus import ANY_SIZE, members, picture, write_tar
from tests.language import OTHER_MODELS, other_language, tiny_language, tiny_tokenizer

PATCH_PX = 4
TWO_TURNS = [
    {"from": "human", "value": "<image>\n<image>\nWhat are these?"},
    {"from": "gpt", "value": "two things"},
    {"from": "human", "value": "sure?"},
    {"from": "gpt", "value": "yes"},
]


def talk(key: str, turns: list[dict[str, Any]], images: int = 0, **others: Any) -> list[tuple[str, bytes]]:
    """The members of a conversation in LLaVA's form or OpenAI's, by the turns' keys."""
    field = "messages" if "role" in turns[0] else "conversations"
    data = json.dumps({field: turns, **others}).encode()
    return [*((f"{key}.{n}.png", picture(20 + 8 * n, 36, n)) for n in range(images)), (f"{key}.json", data)]


def said(question: Any, answer: str) -> list[dict[str, Any]]:
    """One question and its answer in OpenAI's form."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_talks(directory: Path, captions: int = 20, talks: int = 8) -> Path:
    """Captions, conversations about two images and such without one, in two shards."""
    spoken = []
    for n in range(captions):
        texts = {"en": [f"thing {n}", "one thing"], "zh": [f"第{n}个"] if n % 2 else []}
        spoken += members(f"c{n:03d}", picture(14 + n, 30, n), source="captions", captions=texts)
    write_tar(directory / "captions.tar", spoken)
    held = []
    for n in range(talks):
        held += talk(f"two{n}", TWO_TURNS, images=2, source="talks")
        held += talk(f"text{n}", said("hello", "hi " * n + "there"), source="talks")
    write_tar(directory / "talks.tar", held)
    return directory


def indexed(directory: Path) -> Index:
    """Index what lies in a directory."""
    for _ in build_index(str(directory), rules=ANY_SIZE):
        continue
    return load_index(str(directory))


def write_language_model(directory: Path, family: str = "glm4", **options: Any) -> Path:
    """A tiny language model of transformers with its tokenizer."""
    build = other_language if family in OTHER_MODELS else tiny_language
    build(family, **{"vocab_size": 288, "num_hidden_layers": 4, **options}).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def stage3(shards: Path, language: Path, **data: Any) -> RunConfig:
    """A run of six steps."""
    sizes: dict[str, Any] = dict(
        global_batch_images=12,
        tokens_per_pack=128,
        images_per_pack=8,
        text_tokens_per_pack=160,
        max_patches=40,
        min_patches=4,
        canonical_shares=4,
        lookahead_steps=2,
    )
    return RunConfig(
        objective="language",
        vision=CogViTConfig(
            image_size=16,
            patch_size=PATCH_PX,
            embed_dim=32,
            depth=2,
            num_heads=2,
            use_cls_token=False,
            norm="rmsnorm",
            mlp="swiglu",
            position="rotary",
            eps=1e-5,
        ),
        language=LanguageTowerConfig(path=str(language), max_tokens=72, max_patches=60),
        data=DataConfig(shards=str(shards), eval_shards=str(shards), sizing="glm", grid_multiple=2, **(sizes | data)),
        optim=OptimConfig(lr=3e-3, adamw_lr=3e-3),
        schedule=ScheduleConfig(steps=6, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=3),
        eval=EvalConfig(every_steps=4, steps=1),
        log=LogConfig(wandb="off"),
    )


def preset(directory: Path, config: RunConfig) -> str:
    """A run's configuration as a file that the trainer takes."""
    path = directory / "preset.json"
    path.write_text(json.dumps(to_json(config)))
    return str(path)
