"""Cross attention of a language model's blocks to the rows of an encoder that sees images at high resolution.

Shape letters beyond the decoder's: E rows of the encoder, C its width.

Source: CogAgent (arXiv 2312.08914).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.model.attention import Segments
from cogvit.model.blocks import RMSNorm
from cogvit.model.language_config import LanguageConfig


class CrossRows:
    """What the sequences of a pack look at.

    Args:
        row_EC: of all images, end to end.
        count_N: rows of each sequence's images; 0 where it has none.
        keep: keep each block's keys and values, for generation.
    """

    def __init__(self, row_EC: Tensor, count_N: Sequence[int], *, keep: bool = False) -> None:
        self.row_EC, self.count_N = row_EC, tuple(count_N)
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def project(self, key_value: nn.Module, layer: int) -> Tensor:
        """Return a block's keys and values, [E, 2 * dim]."""
        if self._kept is None:
            return key_value(self.row_EC)
        if layer not in self._kept:
            self._kept[layer] = key_value(self.row_EC)
        return self._kept[layer]

    def taken(self, sequences: Sequence[int]) -> CrossRows:
        """Return what the named sequences look at; one may be named several times, or left out."""
        stops = [0, *accumulate(self.count_N)]
        place = [torch.arange(stops[n], stops[n + 1], device=self.row_EC.device) for n in sequences]
        place_E = torch.cat(place)
        found = CrossRows(self.row_EC[place_E], [self.count_N[n] for n in sequences])
        found._kept = None if self._kept is None else {layer: kept[place_E] for layer, kept in self._kept.items()}
        return found


class CrossAttention(nn.Module):
    """norm, then attention of every token to all rows of its own sequence's images; without images it adds nothing.

    Heads are as many as the language model's, and narrower. A new one is the identity: proj begins at 0.
    """

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm = RMSNorm(cfg.embed_dim, eps=cfg.eps)
        self.query = nn.Linear(cfg.embed_dim, cfg.cross.dim, bias=False)
        self.key_value = nn.Linear(cfg.cross.encoder_dim, 2 * cfg.cross.dim, bias=False)
        self.proj = nn.Linear(cfg.cross.dim, cfg.embed_dim, bias=False)

    def forward(self, x_SD: Tensor, rows: CrossRows, segments: Segments | None, layer: int) -> Tensor:
        """Return what is added to the S tokens, [S, D].

        Args:
            x_SD: hidden states.
            rows: of the sequences.
            segments: of the tokens; None where as many tokens belong to each sequence, as behind a cache.
            layer: number of the block.
        """
        query_SHK = rearrange(self.query(self.norm(x_SD)), "s (h k) -> s h k", h=self.num_heads)
        both = rearrange(rows.project(self.key_value, layer), "e (two h k) -> two e h k", two=2, h=self.num_heads)
        each = [len(x_SD) // max(len(rows.count_N), 1)] * len(rows.count_N)
        lengths = each if segments is None else list(segments.lengths[: len(rows.count_N)])
        queries = query_SHK.split([*lengths, len(x_SD) - sum(lengths)])
        outputs, start = [], 0
        for query, count in zip(queries, (*rows.count_N, 0), strict=True):
            key, value = both[:, start : start + count].transpose(1, 2)
            # Without rows it is 0, and still a function of the query's weights.
            query = query.transpose(0, 1)
            seen = F.scaled_dot_product_attention(query, key, value) if count else query * 0
            outputs.append(seen.transpose(0, 1))
            start += count
        out_SD = rearrange(torch.cat(outputs), "s h k -> s (h k)")
        return self.proj(out_SD if len(rows.row_EC) else out_SD + both.sum() * 0)
