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
        key_EHK, value_EHK = split_heads(rows.project(self.key_value, layer), self.num_heads)
        each = (len(x_SD) // max(len(rows.count_N), 1),) * len(rows.count_N)
        lengths = each if segments is None else segments.lengths
        seen_SHK = look(query_SHK, key_EHK, value_EHK, lengths, rows.count_N)
        return self.proj(rearrange(seen_SHK, "s h k -> s (h k)"))


def split_heads(both_EF: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [E, H, K] of [E, 2 H K]."""
    key_EHK, value_EHK = rearrange(both_EF, "e (two h k) -> two e h k", two=2, h=num_heads)
    return key_EHK, value_EHK


def look(
    query_SHK: Tensor, key_EHK: Tensor, value_EHK: Tensor, lengths: Sequence[int], count_N: Sequence[int]
) -> Tensor:
    """Return what tokens gather from all rows of their own sequence, [S, H, K]; 0 where it has none.

    Args:
        query_SHK: of the tokens, sequence after sequence.
        key_EHK: of the rows, likewise.
        value_EHK: likewise.
        lengths: tokens of each sequence; what follows the N that may have rows is padding.
        count_N: rows of each sequence.
    """
    own = lengths[: len(count_N)]
    outputs, start = [], 0
    for query, count in zip(query_SHK.split([*own, len(query_SHK) - sum(own)]), (*count_N, 0), strict=True):
        if not count:
            outputs.append(query * 0)  # and still a function of what made it
            continue
        key, value = (x[start : start + count].transpose(0, 1) for x in (key_EHK, value_EHK))
        outputs.append(F.scaled_dot_product_attention(query.transpose(0, 1), key, value).transpose(0, 1))
        start += count
    seen_SHK = torch.cat(outputs)
    return seen_SHK if len(key_EHK) else seen_SHK + (key_EHK.sum() + value_EHK.sum()) * 0


def is_cross(name: str) -> bool:
    """Whether a weight of a language model is of its cross attention."""
    return ".cross." in name
