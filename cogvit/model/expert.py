"""The visual expert: image tokens have projections of attention and an MLP of their own, and one attention with text.

Source: CogVLM (arXiv 2311.03079).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvit.model.cross import is_cross
from cogvit.model.language_config import LanguageConfig
from cogvit.model.tokens import permute_rows

Branch = Callable[[Tensor], Tensor]  # rows in, as many rows out


@dataclass(frozen=True)
class ExpertRows:
    """Which of S tokens go through the experts.

    Attributes:
        order_S: int64, all tokens, those of the language model before those of the experts.
        place_S: int64, the inverse of order_S.
        num_language: tokens of the language model.
    """

    order_S: Tensor
    place_S: Tensor
    num_language: int


def expert_rows(expert_S: Tensor, count: int | None = None) -> ExpertRows:
    """Return the rows of a mask, bool [S]; without a count of what it names it waits for the device."""
    order_S = expert_S.to(torch.uint8).argsort(stable=True)
    own = int(expert_S.sum()) if count is None else count
    return ExpertRows(order_S, order_S.argsort(), len(expert_S) - own)


def routed(x_SD: Tensor, rows: ExpertRows | None, language: Branch, expert: Branch | None) -> Tensor:
    """Return language(x) with expert(x) where a token is the expert's: each token is computed once.

    x may have dims between S and D, as Megatron's has.

    Without rows, or an expert, it is language(x) as it stands. Rows that name no token still give the expert's
    parameters zero gradients.
    """
    if rows is None or expert is None:
        return language(x_SD)
    sizes = (rows.num_language, len(x_SD) - rows.num_language)
    text, images = permute_rows(x_SD, rows.order_S, rows.place_S).split(sizes)
    return permute_rows(torch.cat([language(text), expert(images)]), rows.place_S, rows.order_S)


class VisualExpert(nn.Module):
    """What image tokens have instead of the language model's: qkv and proj of attention, and the MLP."""

    def __init__(self, cfg: LanguageConfig, mlp: nn.Module) -> None:
        super().__init__()
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        self.qkv = nn.Linear(cfg.embed_dim, heads * cfg.head_dim, bias=cfg.qkv_bias or cfg.expert.qkv_bias)
        self.proj = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.embed_dim, bias=cfg.proj_bias)
        self.mlp = mlp


def is_expert(name: str) -> bool:
    """Whether a weight of a language model is of an expert."""
    return ".expert." in name


def is_grown(name: str) -> bool:
    """Whether a weight is of what a language model has for images alone, which learns where that stays as it is."""
    return is_expert(name) or is_cross(name)


def beginning_of(name: str) -> str:
    """Return the name of the weight that one of an expert begins as a copy of; any other begins as itself."""
    block, found, part = name.partition(".expert.")
    return f"{block}.{'' if part.startswith('mlp.') else 'attn.'}{part}" if found else name


def with_expert_weights(weights: dict[str, Tensor], cfg: LanguageConfig) -> dict[str, Tensor]:
    """Return a language model's weights with experts that begin as copies of it; biases that it lacks begin at 0.

    Args:
        weights: of a `CausalLM` without experts.
        cfg: its shape, with experts.
    """
    grown = dict(weights)
    for layer in filter(cfg.has_expert, range(cfg.depth)):
        own = [f"blocks.{layer}.expert.{part}" for part in ("qkv", "proj", "mlp.fc1", "mlp.fc2")]
        for name in (f"{part}.{kind}" for part in own for kind in ("weight", "bias")):
            if (source := weights.get(beginning_of(name))) is not None:
                grown[name] = source.clone()
        if cfg.expert.qkv_bias and not cfg.qkv_bias:
            rows = len(grown[f"{own[0]}.weight"])
            grown[f"{own[0]}.bias"] = grown[f"{own[0]}.weight"].new_zeros(rows)
    return grown
