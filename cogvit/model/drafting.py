"""Answers in fewer passes: heads propose a few tokens, one pass of the model says which of them it would have chosen.

A token is kept where the model, with the same noise, chooses it too. What comes out is therefore the very answer that
the model gives alone, greedy or drawn, and the heads decide only how long it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogvit.model.decoder import CausalLayout, KeyValueCache, rotary_1d
from cogvit.model.mtp import MtpHeads


@dataclass(frozen=True)
class Prompt:
    """One prompt of S tokens, embedded.

    Attributes:
        x_SD: as the language model sees it.
        embedded_SD: its ids alone, without visual embeddings.
        slot_S: as in `TokensAhead`.
        position_3S: by time, row and column.
        row: its number among the prompts that are answered, which the draws depend on.
    """

    x_SD: Tensor
    embedded_SD: Tensor
    slot_S: Tensor
    position_3S: Tensor
    row: int = 0


@dataclass
class Drafted:
    """Passes of the model over drafts, and the tokens that they gave."""

    passes: int = 0
    tokens: int = 0

    @property
    def accepted_length(self) -> float:
        """Tokens a pass, the model's own among them: 1 where no draft was right."""
        return self.tokens / max(self.passes, 1)

    def __str__(self) -> str:
        return f"accepted length {self.accepted_length:.2f}: {self.tokens} tokens in {self.passes} passes"


class Drafter:
    """The heads at work on one answer: what was said, and a cache for each depth.

    A round is: `hear` what the model made of new places, `say` the token that it chose, then for each depth `deepen`
    and `guess`. A place whose head read a guess is computed again in the next round, with what was said in the end.
    """

    def __init__(self, heads: MtpHeads, prompt: Prompt, width: int) -> None:
        cfg, self.heads = heads.cfg, heads
        self.seen_SD = heads.seen(prompt.embedded_SD, prompt.x_SD, prompt.slot_S)
        self.position_3S = prompt.position_3S
        self.read_S = prompt.slot_S < 0 if cfg.mmtp.images == "masked" else torch.ones_like(prompt.slot_S).bool()
        self.hidden_SD, self._deep_SD = self.seen_SD[:0], self.seen_SD[:0]
        self._start = 0  # the first place to compute: none before it has read a guess
        self._said = len(self.seen_SD)
        one_block = replace(cfg, depth=1)
        self._caches = [KeyValueCache(one_block, (0,), width, prompt.x_SD) for _ in range(cfg.mmtp.depths)]

    def hear(self, hidden_SD: Tensor) -> None:
        """Add what the output matrix reads at places that are certain."""
        self.hidden_SD = torch.cat([self.hidden_SD, hidden_SD])

    def say(self, embedded_SD: Tensor) -> None:
        """Add tokens of the answer; what was guessed is forgotten."""
        self.seen_SD, self.read_S = self.seen_SD[: self._said], self.read_S[: self._said]
        self.position_3S = self.position_3S[:, : self._said]
        self.guess(embedded_SD)
        self._said += len(embedded_SD)

    def guess(self, embedded_SD: Tensor) -> None:
        """Add tokens that the next depths read."""
        following = self.position_3S.max() + 1 + torch.arange(len(embedded_SD), device=embedded_SD.device)
        self.seen_SD = torch.cat([self.seen_SD, embedded_SD])
        self.position_3S = torch.cat([self.position_3S, following.expand(3, -1)], dim=1)
        self.read_S = torch.cat([self.read_S, torch.ones_like(following).bool()])

    def deepen(self, depth: int) -> Tensor:
        """Return what the output matrix reads for one more token, [1, D]; depth counts from 0."""
        if depth == 0:
            self._deep_SD = self.hidden_SD[self._start :]
        places_S = torch.arange(self._start, len(self.hidden_SD), device=self.hidden_SD.device)
        source_S, cache = places_S + depth + 1, self._caches[depth]
        cache.truncate(int(self.read_S[depth + 1 : self._start + depth + 1].sum()))
        read_S = self.read_S[source_S].nonzero().squeeze(1)
        cache.append(len(read_S))
        if len(read_S):
            layout = CausalLayout(None, *rotary_1d(self.position_3S[:, source_S[read_S]], self.heads.cfg))
            layer = self.heads.layer(depth)
            deep_SD = layer(self.seen_SD[source_S[read_S]], self._deep_SD[read_S], layout, cache)
            self._deep_SD = self._deep_SD.index_copy(0, read_S, deep_SD)
        if depth == len(self._caches) - 1:
            self._start = max(len(self.hidden_SD) - depth, 0)
        return self._deep_SD[-1:]
