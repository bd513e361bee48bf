"""Heads that predict the tokens after the next one, of text and images: each reads one more token that is known.

Depth m turns what the depth before it made of place i, and the token m places ahead, into a prediction of the token
m + 1 places ahead. The embedding and the output matrix are the language model's.

Shape letters beyond the project's: S tokens of a pack of sequences, M depths.
Source: section 2.2 of GLM-5V-Turbo's report; the layer is DeepSeek-V3's and `MtpLayer` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from cogvit.batch import TokensAhead, sent
from cogvit.model.attention import Segments
from cogvit.model.blocks import RMSNorm
from cogvit.model.config import ExpertConfig, SeenAtImages
from cogvit.model.decoder import CausalLayout, DecoderBlock, KeyValueCache, rotary_1d
from cogvit.model.language_config import CrossConfig, LanguageConfig


class MtpLayer(nn.Module):
    """Joins a token with what is known before it, then one block and a norm."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (RMSNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * cfg.embed_dim, cfg.embed_dim, bias=False)
        plain = replace(cfg, expert=ExpertConfig(), cross=CrossConfig())
        self.blocks = nn.ModuleList([DecoderBlock(plain, 0)])  # by the names that a stack of layers has everywhere

    def forward(
        self, token_SD: Tensor, hidden_SD: Tensor, layout: CausalLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return what the output matrix reads and the next depth goes on from, [S, D]."""
        joined = torch.cat([self.enorm(token_SD), self.hnorm(hidden_SD)], dim=1)
        return self.norm(self.blocks[0](self.eh_proj(joined), layout, cache))


class MtpHeads(nn.Module):
    """The layers of all depths, one for all or one for each, and what stands for images."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleList(MtpLayer(cfg) for _ in range(cfg.mmtp.num_layers))
        learned = cfg.mmtp.images == "tokens"
        self.image_token = nn.Parameter(torch.empty(cfg.mmtp.tokens, cfg.embed_dim)) if learned else None

    def layer(self, depth: int) -> MtpLayer:
        """Return the layer of a depth, from 0."""
        layer = self.layers[0 if self.cfg.mmtp.share else depth]
        assert isinstance(layer, MtpLayer)
        return layer

    def seen(self, embedded_SD: Tensor, x_SD: Tensor, slot_S: Tensor) -> Tensor:
        """Return what the heads see of each token of a pack, [S, D].

        Args:
            embedded_SD: its ids, embedded; the image token's at visual positions.
            x_SD: what the language model saw, with visual embeddings.
            slot_S: as in `TokensAhead`.
        """
        return seen_by_heads(self.cfg.mmtp.images, self.image_token, embedded_SD, x_SD, slot_S)

    def forward(
        self, hidden_SD: Tensor, seen_SD: Tensor, position_3S: Tensor, segments: Segments, ahead: TokensAhead
    ) -> list[Tensor]:
        """Return for each depth what the output matrix reads, [S, D].

        Args:
            hidden_SD: what it reads for the next token.
            seen_SD: of `seen`.
            position_3S: of the pack's tokens.
            segments: of the pack.
            ahead: of the pack.
        """
        if not self.cfg.mmtp.trunk_gradient:
            hidden_SD = hidden_SD.detach()
        outputs = []
        for depth in range(self.cfg.mmtp.depths):
            reading = reading_of(ahead, depth, segments)
            layout = CausalLayout(reading.segments, *rotary_1d(position_3S[:, reading.source_S], self.cfg))
            after_SD = self.layer(depth)(seen_SD[reading.source_S], reading.ordered(hidden_SD), layout)
            hidden_SD = reading.restored(hidden_SD, after_SD)
            outputs.append(hidden_SD)
        return outputs


def seen_by_heads(
    images: SeenAtImages, image_token_KD: Tensor | None, embedded_SD: Tensor, x_SD: Tensor, slot_S: Tensor
) -> Tensor:
    """Return what heads see of each token of a pack, [S, D]; image_token_KD are the learned tokens, if any."""
    if images == "embeddings":
        return x_SD
    if image_token_KD is None:
        return embedded_SD
    learned_SD = image_token_KD[slot_S.clamp(min=0).long()].to(embedded_SD.dtype)
    return torch.where((slot_S >= 0).unsqueeze(1), learned_SD, embedded_SD)


@dataclass(frozen=True)
class Reading:
    """In which order a depth reads a pack: as it lies, or without images, whose places then stand behind all others.

    Attributes:
        source_S: the token that each place reads.
        segments: of the places that read.
        order_S: the pack's places in the order of reading; None where it is the pack's.
        reads_S: of these, whether the place reads at all.
    """

    source_S: Tensor
    segments: Segments
    order_S: Tensor | None = None
    reads_S: Tensor | None = None

    def ordered(self, x_SD: Tensor) -> Tensor:
        """Return what lies as the pack does in the order of reading."""
        return x_SD if self.order_S is None else x_SD[self.order_S]

    def restored(self, before_SD: Tensor, after_SD: Tensor) -> Tensor:
        """Return what was made in the order of reading as the pack lies; places that do not read keep what was."""
        if self.order_S is None or self.reads_S is None:
            return after_SD
        after_SD = torch.where(self.reads_S.unsqueeze(1), after_SD.to(before_SD.dtype), before_SD[self.order_S])
        return torch.empty_like(before_SD).index_copy(0, self.order_S, after_SD)


def reading_of(ahead: TokensAhead, depth: int, segments: Segments) -> Reading:
    """Return how a depth, from 0, reads a pack of these segments; it does not wait for the device."""
    source_S = ahead.source[depth].long()
    if not ahead.lengths:
        return Reading(source_S, segments)
    reads_S = ahead.slot[source_S] < 0
    place_S = torch.arange(len(source_S), device=source_S.device)
    sample_S = torch.searchsorted(segments.cu_seqlens[1:-1].contiguous(), place_S, right=True)
    order_S = torch.where(reads_S, sample_S, segments.num_valid).argsort(stable=True)
    *lengths, _ = ahead.lengths[depth]
    rest = len(source_S) - sum(lengths)
    bounds = sent([0, *accumulate([*lengths, rest])], source_S.device).to(segments.cu_seqlens.dtype)
    own = Segments(bounds, (*lengths, rest), segments.num_valid)
    return Reading(source_S[order_S], own, order_S, reads_S[order_S])
