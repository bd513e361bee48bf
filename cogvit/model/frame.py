"""The two learned tokens that CogVLM puts around an image's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvit.model.init import init_model


class ImageFrame(nn.Module):
    """A learned embedding before each image's tokens and one behind them.

    Args:
        llm_dim: D, width of the language model.
    """

    def __init__(self, llm_dim: int) -> None:
        """Build one with new weights."""
        super().__init__()
        self.boi_embed = nn.Parameter(torch.zeros(1, llm_dim))
        self.eoi_embed = nn.Parameter(torch.zeros(1, llm_dim))
        init_model(self, int(torch.randint(2**62, (), device="cpu")))

    def forward(self, visual_ED: Tensor, count_N: Sequence[int]) -> Tensor:
        """Return the images' tokens with those around them, [E + 2 N, D].

        Args:
            visual_ED: tokens of all images end to end.
            count_N: tokens of each; 0 where there is no image, which is left out.
        """
        boi, eoi = (x.to(visual_ED.dtype) for x in (self.boi_embed, self.eoi_embed))
        pieces = [visual_ED[:0], boi[:0], eoi[:0]]  # without images both still get zero gradients
        for image in visual_ED.split(list(count_N)):
            if len(image):
                pieces += [boi, image, eoi]
        return torch.cat(pieces)
