"""Choosing the next token, greedily or by chance, one token at a time for sequences of any lengths side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cogvit.draws import mix, uniform

Draft = Literal["none", "mtp"]
_SAMPLING_SALT = 0x73616D70  # "samp"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: of an answer, its end included.
        temperature: 0 takes the most likely token, 1 draws as the model says, more is wilder.
        top_p: draws among the most likely tokens that have this much of the probability together.
        seed: of the draws, which are hashes of the seed, the row and the token's place.

    Errors: ValueError when a number is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def check_width(lengths: Sequence[int], sampling: Sampling, max_tokens: int) -> int:
    """Return the tokens of the longest prompt and answer.

    Errors: ValueError when a prompt is empty, or they exceed max_tokens.
    """
    width = max(lengths, default=0) + sampling.max_new_tokens
    if not min(lengths, default=0):
        raise ValueError("a prompt is empty; it needs at least one token")
    if width > max_tokens:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and an answer of {sampling.max_new_tokens} exceed the model's"
            f" max_tokens={max_tokens}"
        )
    return width


def next_tokens(logits_BV: Tensor, sampling: Sampling, step: int, first_row: int = 0) -> Tensor:
    """Return the id [B] that follows in each row.

    Args:
        logits_BV: of the rows' last tokens.
        sampling: how to choose.
        step: number of the answer's token, from 0.
        first_row: number of the first of these rows among all that are answered.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(1)
    likely_BV, id_BV = (logits_BV.double() / sampling.temperature).softmax(1).sort(dim=1, descending=True)
    mass_BV = likely_BV.cumsum(1)
    kept_BV = mass_BV - likely_BV < sampling.top_p  # the first one always
    mass_BV = torch.where(kept_BV, mass_BV, mass_BV.new_tensor(math.inf))
    row_B = first_row + torch.arange(len(logits_BV), device=logits_BV.device)
    draw_B = uniform(mix(row_B, _SAMPLING_SALT, sampling.seed), step).double()
    total_B = (likely_BV * kept_BV).sum(1)
    place_B = (mass_BV <= (draw_B * total_B).unsqueeze(1)).sum(1).clamp(max=kept_BV.sum(1) - 1)
    return id_BV.gather(1, place_B.unsqueeze(1)).squeeze(1)


def drawn_tokens(logits_BV: Tensor, key_B: Tensor, place_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw the id [B] that follows in each row, of all tokens; returns it with its log-probability, fp32 [B], nats.

    A row's draw is a hash of its key and place alone, and tokens keep the order of the vocabulary: it does not matter
    which rows stand beside it, nor which of two tokens is a little more likely.

    Args:
        logits_BV: of the rows' last tokens.
        key_B: int64, of each row's draws.
        place_B: int64, number of each row's token, from 0.
        temperature: above 0.
    """
    logprob_BV = (logits_BV.float() / temperature).log_softmax(1)
    mass_BV = logprob_BV.double().exp().cumsum(1)
    draw_B = uniform(key_B, place_B).double() * mass_BV[:, -1]
    id_B = (mass_BV <= draw_B.unsqueeze(1)).sum(1).clamp(max=logits_BV.shape[1] - 1)
    return id_B, logprob_BV.gather(1, id_B.unsqueeze(1)).squeeze(1)
