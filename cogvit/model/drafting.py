"""Answers in fewer passes: heads propose a few tokens, one pass of the model says which of them it would have chosen.

A token is kept where the model, with the same noise, chooses it too. What comes out is therefore the very answer that
the model gives alone, greedy or drawn, and the heads decide only how long it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogvit.model.cross import CrossRows
from cogvit.model.decoder import CausalLayout, KeyValueCache, rotary_1d
from cogvit.model.expert import ExpertRows
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
        expert: tokens that go through the visual experts.
        cross: what cross attention looks at.
    """

    x_SD: Tensor
    embedded_SD: Tensor
    slot_S: Tensor
    position_3S: Tensor
    row: int = 0
    expert: ExpertRows | None = None
    cross: CrossRows | None = None


@dataclass
class Drafted:
    """Passes of the model over drafts, and the tokens that they gave."""

    passes: int = 0
    tokens: int = 0

    @property
    def accepted_length(self) -> float:
        """Tokens a pass, the model's own among them: 1 where no draft was right, or nothing was drafted."""
        return self.tokens / self.passes if self.passes else 1.0

    def __str__(self) -> str:
        return f"accepted length {self.accepted_length:.2f}: {self.tokens} tokens in {self.passes} passes"


class Drafter:
    """The heads at work on one answer: what was said, and a cache for each depth.

    A round is: `hear` what the model made of new places, `say` the token that it chose, then for each depth `deepen`
    and `guess`. A place whose head read a guess is computed again in the next round, with what was said in the end.
    """

    def __init__(self, heads: MtpHeads, prompt: Prompt, width: int) -> None:
        cfg, self.heads = heads.cfg, heads
        seen_SD, length = heads.seen(prompt.embedded_SD, prompt.x_SD, prompt.slot_S), len(prompt.x_SD)
        places = width + cfg.mmtp.depths  # guesses may go beyond the longest answer
        self._seen_SD = torch.cat([seen_SD, seen_SD.new_zeros(places - length, seen_SD.shape[1])])
        after_S = prompt.position_3S.max() + 1 + torch.arange(places - length, device=seen_SD.device)
        self._position_3S = torch.cat([prompt.position_3S, after_S.expand(3, -1)], dim=1)
        self._hidden_SD, self._deep_SD = torch.zeros_like(self._seen_SD), seen_SD[:0]
        self._unread_S = prompt.slot_S >= 0 if cfg.mmtp.images == "masked" else None  # of the prompt
        self._start = 0  # the first place to compute: none before it has read a guess
        self.heard, self._said, self._known = 0, length, length  # places; what is guessed is known too
        one_block = replace(cfg, depth=1)
        self._caches = [KeyValueCache(one_block, (0,), width, prompt.x_SD) for _ in range(cfg.mmtp.depths)]

    def positions(self, count: int) -> Tensor:
        """Return the rotary positions [3, count] of the places after those that were heard."""
        return self._position_3S[:, self.heard : self.heard + count]

    def hear(self, hidden_SD: Tensor) -> None:
        """Add what the output matrix reads at places that are certain."""
        self._hidden_SD[self.heard : self.heard + len(hidden_SD)] = hidden_SD
        self.heard += len(hidden_SD)

    def say(self, embedded_SD: Tensor) -> None:
        """Add tokens of the answer; what was guessed is forgotten."""
        self._known = self._said
        self.guess(embedded_SD)
        self._said = self._known

    def guess(self, embedded_SD: Tensor) -> None:
        """Add tokens that the next depths read."""
        self._seen_SD[self._known : self._known + len(embedded_SD)] = embedded_SD
        self._known += len(embedded_SD)

    def deepen(self, depth: int) -> Tensor:
        """Return what the output matrix reads for one more token, [1, D]; depth counts from 0."""
        if depth == 0:
            self._deep_SD = self._hidden_SD[self._start : self.heard]
        source_S = torch.arange(self._start, self.heard, device=self._seen_SD.device) + depth + 1
        cache, unread, read_S = self._caches[depth], 0, torch.arange(len(source_S), device=source_S.device)
        if self._unread_S is not None:
            unread = int(self._unread_S[depth + 1 : self._start + depth + 1].sum())
            new_S = self._unread_S[self._start + depth + 1 : self.heard + depth + 1]
            read_S = torch.cat([(~new_S).nonzero().squeeze(1), read_S[len(new_S) :]])
        cache.truncate(self._start - unread)
        cache.append(len(read_S))
        if len(read_S):
            source_S = source_S[read_S]
            layout = CausalLayout(None, *rotary_1d(self._position_3S[:, source_S], self.heads.cfg))
            deep_SD = self.heads.layer(depth)(self._seen_SD[source_S], self._deep_SD[read_S], layout, cache)
            self._deep_SD = self._deep_SD.index_copy(0, read_S, deep_SD)
        if depth == len(self._caches) - 1:
            self._start = max(self.heard - depth, 0)
        return self._deep_SD[-1:]
