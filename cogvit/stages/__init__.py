"""The stages of training, each a room of its own: `stage_of` finds a run's.

Whatever differs between stages is asked of it; nothing else asks for the objective's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cogvit.config import RunConfig, to_json
from cogvit.config.arguments import take_flag
from cogvit.config.flags import flags_given, load_preset, parse
from cogvit.config.presets import check_teachers, resized, with_own_data
from cogvit.config.recipe import EXECUTION, Difference, differences
from cogvit.config.rules import check_data, check_layout, check_training
from cogvit.errors import ConfigError
from cogvit.stages.contrast import ContrastStage
from cogvit.stages.distill import DistillStage
from cogvit.stages.language import LanguageStage
from cogvit.stages.policy import PolicyStage
from cogvit.stages.protocol import Stage

if TYPE_CHECKING:
    from torch import nn

    from cogvit.parallel.mesh import Mesh
    from cogvit.training.objective import Objective

__all__ = ["Stage", "build", "check_recipe", "check_run", "read_run", "recipe_differences", "settings_of", "stage_of"]

_ALL: tuple[Stage, ...] = (DistillStage(), ContrastStage(), LanguageStage(), PolicyStage())


def stage_of(config: RunConfig) -> Stage:
    """Return the stage that a run trains."""
    match config.objective:
        case "distill":
            return DistillStage()
        case "contrast":
            return ContrastStage()
        case "language":
            return LanguageStage()
        case "policy":
            return PolicyStage()


def read_run(preset: str, words: Sequence[str]) -> RunConfig:
    """Return a preset with the flags of a command line, --size among them.

    Errors: ConfigError as `parse`, for a flag that belongs to another stage, and where the demo's teachers are left for
    a user's own data.
    """
    size, words = take_flag(list(words), "--size")
    base, given = load_preset(preset), flags_given(words)
    paths = [path for _, path in given]
    base = with_own_data(resized(base, size) if size else base, paths)
    if "objective" in paths:
        base = parse(base, list(words))
    own = stage_of(base)
    for flag, path in given:
        if _belongs(path, own.fields):
            continue
        for other in _ALL:
            if _belongs(path, other.fields):
                raise ConfigError(f"{flag} is of {other.title} alone, and {preset} is {own.title}; leave it out")
    config = _of_stream(parse(base, list(words)), paths)
    check_teachers(config, paths)
    return config


def _of_stream(config: RunConfig, given: Sequence[str]) -> RunConfig:
    """Return a sequential run without the preset's part that is held out: a stream has no index to split by."""
    if config.data.order != "sequential" or "data.held_out" in given:
        return config
    every_steps = config.eval.every_steps if config.data.eval_shards or "eval.every_steps" in given else 0
    return replace(config, data=replace(config.data, held_out=0.0), eval=replace(config.eval, every_steps=every_steps))


def check_recipe(config: RunConfig) -> None:
    """Refuse, before any heavy import, values that cannot run on any number of processes. Errors: ConfigError."""
    check_data(config)
    check_training(config)
    stage_of(config).check(config)


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse, before any heavy import, what cannot run on world_size processes. Errors: ConfigError."""
    check_layout(config, world_size, stage_of(config).towers(config))
    check_recipe(config)


def recipe_differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    """Return the differences that make `new` another run than `old`, unless the files that they name are the same.

    What only says how a run is executed does not count.
    """
    return differences(old, new, ignored=EXECUTION + sum((stage.execution for stage in _ALL), ()))


def build(config: RunConfig, mesh: Mesh, target_dims: dict[str, int]) -> tuple[nn.Module, Objective]:
    """Return what this rank trains; see `Stage.build`."""
    return stage_of(config).build(config, mesh, target_dims)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON values, without the fields that its stage has no use for."""
    own = stage_of(config).fields
    foreign = [path for stage in _ALL for path in stage.fields if not _belongs(path, own)]

    def kept(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            path = f"{prefix}{name}"
            if _belongs(path, foreign) or (f"{path}." in foreign and f"{path}." not in own):
                continue
            found[name] = kept(value, f"{path}.") if isinstance(value, dict) else value
        return found

    return kept(to_json(config), "")


def _belongs(path: str, fields: Sequence[str]) -> bool:
    return any(path == field or (field.endswith(".") and path.startswith(field)) for field in fields)
