"""Which parameter is updated how, and the learning rate of a step; pure data, the same on every rank and layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch.nn import Parameter

from cogvit.config import ModuleConfig, OptimConfig, ScheduleConfig

Module = Literal["vision", "text", "projection", "temperature", "bias", "adapter", "language", "expert", "cross"]
Kind = Literal["muon", "adamw", "sgd"]
Role = Literal["block_matrix", "matrix", "vector"]

_ROLES: dict[Module, tuple[Role, ...]] = {
    "vision": ("block_matrix", "matrix", "vector"),
    "text": ("block_matrix", "matrix", "vector"),
    "projection": ("matrix", "vector"),
    "temperature": ("vector",),
    "bias": ("vector",),
    "adapter": ("matrix", "vector"),
    "language": ("block_matrix", "matrix", "vector"),
    "expert": ("block_matrix", "vector"),
    "cross": ("block_matrix", "matrix", "vector"),
}
_EARLY: tuple[Module, ...] = ("vision", "text", "projection", "temperature", "bias")  # every run has their groups


MASTER = "master"  # what the fp32 parameter is called beside its moments


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of one module that are updated alike."""

    module: Module
    kind: Kind
    base_lr: float
    lr_mult: float
    weight_decay: float
    schedule: ScheduleConfig
    params: tuple[Parameter, ...]

    @property
    def peak_lr(self) -> float:
        """The rate where the schedule's factor is 1."""
        return self.base_lr * self.lr_mult


def role_of(name: str, param: Parameter) -> Role:
    """Say what a parameter is to the optimizer, from its name and rank alone, so that every layout agrees.

    A block matrix is a 2-D weight inside a transformer block. Other matrices are the patch embedding, heads and
    projections. Vectors are what is never decayed: norms, biases, LayerScale, the CLS and mask tokens, scalars, and the
    tables of token and position embeddings, whose rows are looked up one by one: decay would pull at rows that a batch
    does not show.
    """
    if param.ndim < 2 or name.endswith(("cls_token", "mask_token")) or is_table(name):
        return "vector"
    in_block = any(part in ("blocks", "layers", "layer") for part in name.split("."))
    return "block_matrix" if in_block and param.ndim == 2 else "matrix"


def is_table(name: str) -> bool:
    """Whether a parameter is a table of embeddings, by its name: ours, Megatron's and transformers' end alike."""
    *_, owner, leaf = ("", *name.split("."))
    return leaf == "embed" or (leaf == "weight" and "embed" in owner)


def param_groups(
    named: Iterable[tuple[str, Parameter, Module]],
    config: OptimConfig,
    schedule: ScheduleConfig,
    *,
    later: Collection[Module] = (),
) -> list[ParamGroup]:
    """Sort parameters into groups: the same list in the same order for every model and stage, empty groups included.

    named: name, parameter and module of every trainable parameter of this rank. A module has one group per role.
    later: modules that came with stage 3, of which the run has these; the same on all ranks.
    """
    # A norm over groups is rounded by how many there are: runs without the later modules keep their bits.
    roles_of = {module: roles for module, roles in _ROLES.items() if module in _EARLY or module in later}
    members: dict[tuple[Module, Role], list[Parameter]] = {
        (module, role): [] for module, roles in roles_of.items() for role in roles
    }
    for name, param, module in named:
        members[module, role_of(name, param)].append(param)
    return [_group(module, role, params, config, schedule) for (module, role), params in members.items()]


def module_config(module: Module, config: OptimConfig) -> ModuleConfig:
    """Return a module's own settings."""
    return {
        "vision": config.vision,
        "text": config.text,
        "projection": config.projection,
        "temperature": config.temperature,
        "bias": config.bias,
        "adapter": config.adapter,
        "language": config.language,
        "expert": config.expert,
        "cross": config.cross,
    }[module]


def module_schedule(module: Module, config: OptimConfig, run: ScheduleConfig) -> ScheduleConfig:
    """Return the run's schedule with the module's own decay."""
    own = module_config(module, config)
    return replace(
        run,
        kind=own.schedule or run.kind,
        final_fraction=run.final_fraction if own.final_fraction is None else own.final_fraction,
    )


def _group(
    module: Module, role: Role, params: list[Parameter], config: OptimConfig, schedule: ScheduleConfig
) -> ParamGroup:
    own = module_config(module, config)
    decay = config.weight_decay if own.weight_decay is None else own.weight_decay
    beside_muon = config.name == "muon" and role != "block_matrix"
    return ParamGroup(
        module=module,
        kind="adamw" if beside_muon else config.name,
        base_lr=config.adamw_lr if beside_muon else config.lr,
        lr_mult=own.lr_mult,
        weight_decay=0.0 if role == "vector" else decay,
        schedule=module_schedule(module, config, schedule),
        params=tuple(params),
    )


def lr_at(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor in [0, 1] on every peak rate for the update with this index; the first update is step 0.

    Warm-up is linear and starts one part above 0, so no update is lost: step s has (s + 1) / warmup_steps. The decay
    starts at 1 in step warmup_steps and reaches final_fraction in step `steps`, where it stays. "wsd" (warm-up, stable,
    decay: Hu et al. 2024, arXiv:2404.06395) stays at 1 until the last decay_fraction of the steps and falls linearly.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, schedule.steps - round(schedule.decay_fraction * schedule.steps))
    done = min(1.0, max(0, step - start) / max(1, schedule.steps - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * left
