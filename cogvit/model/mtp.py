"""Heads that predict the tokens after the next one, of text and images: each reads one more token that is known.

Depth m turns what the depth before it made of place i, and the token m places ahead, into a prediction of the token
m + 1 places ahead. The embedding and the output matrix are the language model's.

Shape letters beyond the project's: S tokens of a pack of sequences, M depths.
Source: section 2.2 of GLM-5V-Turbo's report; the layer is DeepSeek-V3's and `MtpLayer` of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvit.batch import TokensAhead
from cogvit.model.attention import Segments
from cogvit.model.blocks import RMSNorm
from cogvit.model.decoder import CausalLayout, DecoderBlock, KeyValueCache, rotary_1d
from cogvit.model.language_config import LanguageConfig


class MtpLayer(nn.Module):
    """Joins a token with what is known before it, then one block and a norm."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (RMSNorm(cfg.embed_dim, eps=cfg.eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * cfg.embed_dim, cfg.embed_dim, bias=False)
        self.block = DecoderBlock(cfg, 0)

    def forward(
        self, token_SD: Tensor, hidden_SD: Tensor, layout: CausalLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return what the output matrix reads and the next depth goes on from, [S, D]."""
        joined = torch.cat([self.enorm(token_SD), self.hnorm(hidden_SD)], dim=1)
        return self.norm(self.block(self.eh_proj(joined), layout, cache))


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
        if self.cfg.mmtp.images == "embeddings":
            return x_SD
        if self.image_token is None:
            return embedded_SD
        learned_SD = self.image_token[slot_S.clamp(min=0).long()].to(embedded_SD.dtype)
        return torch.where((slot_S >= 0).unsqueeze(1), learned_SD, embedded_SD)

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
        for depth, source_S in enumerate(ahead.source.long()):
            places_S, own = None, segments
            if self.cfg.mmtp.images == "masked":
                places_S, own = _without_images(source_S, ahead.slot, segments)
                source_S = source_S[places_S]
            layout = CausalLayout(own, *rotary_1d(position_3S[:, source_S], self.cfg))
            before = hidden_SD if places_S is None else hidden_SD[places_S]
            after = self.layer(depth)(seen_SD[source_S], before, layout)
            hidden_SD = after if places_S is None else hidden_SD.index_copy(0, places_S, after.to(hidden_SD.dtype))
            outputs.append(hidden_SD)
        return outputs


def _without_images(source_S: Tensor, slot_S: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The places that read text, and the sequences that are left of a pack; it waits for the device."""
    kept_S = slot_S[source_S] < 0
    lengths = tuple(int(part.sum()) for part in kept_S.split(segments.lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(segments.cu_seqlens)
    return kept_S.nonzero().squeeze(1), Segments(bounds, lengths, segments.num_valid)
