"""Parameter groups of plain torch optimizers: a learning rate per module, weight decay for matrices only."""

from __future__ import annotations

from typing import TypedDict

from torch import nn
from torch.optim import Optimizer


class ParamGroup(TypedDict):
    """One group as torch.optim takes it, with the multiplier that `apply_lr_mult` reads."""

    name: str
    params: list[nn.Parameter]
    weight_decay: float
    lr_mult: float


def build_param_groups(
    *named_parts: tuple[str, nn.Module, float],
    weight_decay: float = 0.05,
    no_decay_names: tuple[str, ...] = ("bias", "norm", "log_t", "cls_token", "mask_token", "pos_embed"),
) -> list[ParamGroup]:
    """Return a decayed and an undecayed group for each (name, module, learning-rate multiplier).

    Parameters of fewer than two dims are never decayed, nor are token embeddings (nn.Embedding) and position tables;
    patch embeddings are. The temperature and bias of the sigmoid loss get a group "loss.nodecay" where the parts hold a
    projection of `CogViTForContrastive` but not the loss itself.

    Args:
        named_parts: disjoint modules.
        weight_decay: of the decayed groups.
        no_decay_names: a parameter with one of these in its name is not decayed.
    """
    groups: list[ParamGroup] = []
    taken: set[nn.Parameter] = set()
    companions: dict[nn.Parameter, None] = {}
    for part, module, lr_mult in named_parts:
        split: dict[str, list[nn.Parameter]] = {"decay": [], "nodecay": []}
        tables = {child.weight for child in module.modules() if isinstance(child, nn.Embedding)}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or parameter in tables or any(tag in name for tag in no_decay_names)
                split["nodecay" if exempt else "decay"].append(parameter)
                taken.add(parameter)
        for child in module.modules():
            for companion in getattr(child, "trains_with", ()):
                companions.update(dict.fromkeys(companion.parameters()))
        for kind, params in split.items():
            if params:
                decay = weight_decay if kind == "decay" else 0.0
                groups.append(ParamGroup(name=f"{part}.{kind}", params=params, weight_decay=decay, lr_mult=lr_mult))
    left = [parameter for parameter in companions if parameter.requires_grad and parameter not in taken]
    if left:
        groups.append(ParamGroup(name="loss.nodecay", params=left, weight_decay=0.0, lr_mult=1.0))
    return groups


def apply_lr_mult(optimizer: Optimizer) -> None:
    """Set each group's learning rate to the optimizer's times the group's `lr_mult` (1 where it has none).

    Call it once after building the optimizer and before its scheduler: torch's schedulers scale each group's own rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * group.get("lr_mult", 1.0)
