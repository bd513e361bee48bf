"""Writes the two small teachers of the demo: python -m tools.make_demo_teachers --out DIR.

They are transformers checkpoints like any other, with seeded random weights: nobody trained them. A random network still
has structure to learn from. Its patch filters are drawn smooth, so that a feature tells the colors and coarse strokes of
its patch rather than single pixels, and its attention spreads them, so that a masked patch is partly told by the rest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

SEED = 20260101
WIDTH, HEADS, LAYERS = 96, 4, 2
FILTER_SMOOTHNESS = 1.0
NOTICE = """The demo's teachers are UNTRAINED: random weights, enough to show that the student learns what its teachers say.
For an encoder worth using, pass real ones (local directories or hub names):
  --teachers.members.siglip2.path google/siglip2-so400m-patch16-naflex
  --teachers.members.dinov3.path facebook/dinov3-vitl16-pretrain-lvd1689m"""


def smooth_filters(num_filters: int, side_px: int, decay: float, generator: torch.Generator) -> Tensor:
    """Draw [num_filters, 3, side, side] random mixtures of cosines whose weight falls with their frequency."""
    frequency = torch.arange(side_px)
    cosines = torch.cos(torch.pi * (torch.arange(side_px)[:, None] + 0.5) * frequency / side_px)
    weight = (1.0 + frequency[:, None] + frequency).float() ** -decay
    amplitude = torch.randn(num_filters, 3, side_px, side_px, generator=generator) * weight
    filters = torch.einsum("yu,xv,fcuv->fcyx", cosines, cosines, amplitude)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
