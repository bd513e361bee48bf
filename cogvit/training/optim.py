"""Which parameter is updated how, and the learning rate of a step; pure data, the same on every rank and layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch.nn import Parameter

from cogvit.config import OptimConfig, ScheduleConfig

Module = Literal["vision", "text", "projection", "temperature"]
Kind = Literal["muon", "adamw", "sgd"]
Role = Literal["block_matrix", "matrix", "vector"]

MASTER = "master"  # what the fp32 parameter is called beside its moments


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of one module that are updated alike."""

    module: Module
    kind: Kind
    base_lr: float
    lr_mult: float
    weight_decay: float
    params: tuple[Parameter, ...]

    @property
    def peak_lr(self) -> float:
        """The rate where the schedule's factor is 1."""
        return self.base_lr * self.lr_mult


def role_of(name: str, param: Parameter) -> Role:
    """Say what a parameter is to the optimizer, from its name and rank alone, so that every layout agrees.

    A block matrix is a 2-D weight inside a transformer block. Other matrices are embeddings, the position table, the
    patch embedding, heads and projections. Vectors are norms, biases, LayerScale, the CLS and mask tokens and scalars.
    """
    if param.ndim < 2 or name.endswith(("cls_token", "mask_token")):
        return "vector"
    in_block = any(part in ("blocks", "layers") for part in name.split("."))
    return "block_matrix" if in_block and param.ndim == 2 else "matrix"


def param_groups(named: Iterable[tuple[str, Parameter, Module]], config: OptimConfig) -> list[ParamGroup]:
    """Sort parameters into groups: the same list in the same order for every model and stage, empty groups included.

    named: name, parameter and module of every trainable parameter of this rank. Every module has one group per role.
    """
    members: dict[tuple[Module, Role], list[Parameter]] = {
        (module, role): [] for module in get_args(Module) for role in get_args(Role)
    }
    for name, param, module in named:
        members[module, role_of(name, param)].append(param)
    return [_group(module, role, params, config) for (module, role), params in members.items()]


def _group(module: Module, role: Role, params: list[Parameter], config: OptimConfig) -> ParamGroup:
    lr_mult = {
        "vision": config.vision_lr_mult,
        "text": config.text_lr_mult,
        "projection": config.projection_lr_mult,
        "temperature": config.temperature_lr_mult,
    }[module]
    beside_muon = config.name == "muon" and role != "block_matrix"
    return ParamGroup(
        module=module,
        kind="adamw" if beside_muon else config.name,
        base_lr=config.adamw_lr if beside_muon else config.lr,
        lr_mult=lr_mult,
        weight_decay=0.0 if role == "vector" else config.weight_decay,
        params=tuple(params),
    )


def lr_at(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor in [0, 1] on every peak rate for the update with this index; the first update is step 0.

    Warm-up is linear and starts one part above 0, so no update is lost: step s has (s + 1) / warmup_steps. The decay
    starts at 1 in step warmup_steps and reaches final_fraction in step `steps`, where it stays.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * left
