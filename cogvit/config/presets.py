"""What a command line makes of a preset before its flags: another size, a user's own data in place of the demo's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cogvit.config.fields import RunConfig
from cogvit.errors import ConfigError
from cogvit.model.config import SHAPES

_DEMO = "runs/demo/"  # where `make demo` keeps its corpus and untrained teachers
_HELD_OUT = 0.01


def resized(config: RunConfig, size: str) -> RunConfig:
    """Return a run whose vision tower has a named size, and whose text tower of ours has its width.

    Errors: ConfigError for an unknown size.
    """
    if size not in SHAPES:
        raise ConfigError(f"--size {size} is unknown; sizes are {', '.join(SHAPES)}")
    width, depth, heads, mlp = SHAPES[size]
    text = replace(config.text, embed_dim=width, num_heads=heads, mlp_ratio=mlp / width)
    vision = replace(config.vision, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width)
    return replace(config, vision=vision, text=text)


def with_own_data(config: RunConfig, given: Sequence[str]) -> RunConfig:
    """Return a preset without the demo's held-out shards where the command line names shards of its own.

    A part of the user's is held out instead, by hash. given: the paths of the fields that the command line sets.
    """
    data = config.data
    if "data.shards" not in given or "data.eval_shards" in given or not data.eval_shards.startswith(_DEMO):
        return config
    return replace(config, data=replace(data, eval_shards="", held_out=_HELD_OUT, mixture=()))


def check_teachers(config: RunConfig, given: Sequence[str]) -> None:
    """Refuse the demo's untrained teachers for a user's own shards, unless they are named. Errors: ConfigError."""
    if "data.shards" not in given or config.teachers.source == "store":
        return
    for member in config.teachers.members:
        flag = f"teachers.members.{member.name}.path"
        if member.path.startswith(_DEMO) and flag not in given and "teachers.members" not in given:
            raise ConfigError(
                f"--{flag} is still the demo's untrained teacher {member.path}; name a real one (google/siglip2-..., "
                "facebook/dinov3-...), or this one if it is only to try"
            )
