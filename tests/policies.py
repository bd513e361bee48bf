"""A run of stage 4 on tasks of two files with a tiny model that has learned nothing: quick, and never equal rewards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cogvit.config import ReinforcementConfig, RunConfig, ScheduleConfig
from tests.conversations import stage3, write_language_model

TASK = '''
"""A task on a drawn picture: what an answer is worth depends on all of its characters."""

from PIL import Image

from cogvit.rl.families import ask


class {name}:
    source = "{source}"

    def reset(self, seed):
        self.left = {turns}
        color = (seed % 251, seed // 251 % 241, seed // 7 % 239)
        image = Image.new("RGB", ({side_px}, 24), color)
        image.paste((255, 255, 255), (seed % 9, seed % 7, 8 + seed % 9, 12 + seed % 7))
        self.follow_up = [{{"role": "user", "content": "again?"}}]
        return ask(image, "What is {source}?")

    def step(self, text):
        self.left -= 1
        return self.follow_up if self.left else None

    def verify(self, answer):
        return sum(answer.encode()) % 7 / 6
'''


def write_tasks(directory: Path) -> str:
    """Two tasks, one of two turns, as --rl.tasks takes them."""
    names = []
    for name, turns, side_px in (("One", 1, 24), ("Two", 2, 32)):
        path = directory / f"{name.lower()}.py"
        path.write_text(TASK.format(name=name, source=name.lower(), turns=turns, side_px=side_px))
        names.append(f"{path}:{name}")
    return ",".join(names)


def stage4(directory: Path, **options: Any) -> RunConfig:
    """A run of four steps, whose tasks and language model are written into a directory."""
    base = stage3(directory, write_language_model(directory / "language", attention_bias=False))
    own = ReinforcementConfig(**{"tasks": write_tasks(directory), "group": 4, "max_new_tokens": 5, **options})
    return replace(
        base,
        objective="policy",
        rl=own,
        data=replace(
            base.data, shards="", eval_shards="", global_batch_images=16, tokens_per_pack=160, images_per_pack=24,
            text_tokens_per_pack=480, max_patches=40,
        ),
        schedule=ScheduleConfig(steps=4, warmup_steps=0),
        checkpoint=replace(base.checkpoint, every_steps=2),
        eval=replace(base.eval, every_steps=0),
    )  # fmt: skip
