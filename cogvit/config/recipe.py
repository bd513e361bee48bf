"""What makes a run the same run when it is started again: everything but how it is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cogvit.config.fields import RunConfig
from cogvit.config.reinforcement import task_file
from cogvit.config.tree import to_json

# What may differ between a run and its resumption: how it is executed, never what it computes. Stages have more.
EXECUTION = (
    "parallel.", "memory.", "device", "deterministic", "fusion", "zero.", "guard.", "eval.", "log.", "out",
    "optim.muon_tp", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last",
    "checkpoint.keep_every_steps",
    "data.index_dir", "data.eval_shards", "data.topology", "data.cache_dir", "data.cache_bytes",
    "data.tokens_per_pack", "data.images_per_pack", "data.text_tokens_per_pack", "data.full_packs",
    "data.prefetch_steps", "data.decode_threads", "data.loading", "data.max_wait_s", "data.max_bad_fraction",
    "teachers.ray_address",
)  # fmt: skip


Part = Literal["vision", "adapter", "language"]
PARTS: tuple[Part, ...] = ("vision", "adapter", "language")  # of stage 3's model


def frozen_parts(config: RunConfig) -> tuple[Part, ...]:
    """Return the parts of stage 3 whose rate is 0: they keep their weights, which are not stored again."""
    return tuple(part for part in PARTS if getattr(config.optim, part).lr_mult == 0.0)


@dataclass(frozen=True)
class Difference:
    """A field that two configurations have other values in."""

    field: str  # dotted; a member of a list goes by its name
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} -> {self.after!r}"


def differences(old: RunConfig, new: RunConfig, *, ignored: Sequence[str] = ()) -> list[Difference]:
    """Return the differences in the order of their names, but those of the ignored fields and parts."""
    before, after = _flatten(to_json(old)), _flatten(to_json(new))
    return [
        Difference(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(tuple(ignored))
    ]


def files_of(config: RunConfig) -> dict[str, str]:
    """Return the files and directories that decide what a run computes, by their fields; shards are not among them."""
    members = {f"teachers.members.{member.name}.path": member.path for member in config.teachers.members}
    named = {
        "init": config.init,
        "data.tokenizer": config.data.tokenizer,
        "text_encoder.path": config.text_encoder.path,
        "language.path": config.language.path,
        "teachers.stats": config.teachers.stats,
    }
    return {field: path for field, path in (named | members).items() if path}


def prompts_hash(config: RunConfig) -> str:
    """Return a hash of what decides a run's prompts and rewards beside the policy's weights: a user's code too."""
    own, digest = config.rl, hashlib.blake2b(digest_size=8)
    tasks, judges = own.tasks.split(","), [name for name, _ in own.judge]
    settings = (",".join(map(_placeless, tasks)), own.mixture, own.group, own.max_new_tokens, own.temperature)
    weights = [(_placeless(name), weight) for name, weight in own.judge]
    digest.update(repr((*settings, config.data.global_batch_images, config.seed, *weights)).encode())
    for file in map(task_file, (*tasks, *judges)):
        if file is not None and file[0].is_file():
            digest.update(file[0].read_bytes())
    return digest.hexdigest()


def _placeless(name: str) -> str:
    """The name of a task or judge without the place of its file, which does not matter."""
    file = task_file(name)
    return name.strip() if file is None else f":{file[1]}"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) and one.get("name") for one in value):
            value = {one["name"]: one for one in value}
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
