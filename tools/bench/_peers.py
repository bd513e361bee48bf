"""The encoders that CogViT is measured beside: timm's NaFlexVit and transformers' Siglip2VisionModel.

Both take patches padded to the longest image of a batch, with a mask. They have the blocks of our `CogViTConfig` with
LayerNorm, GELU, learned positions, no CLS token and no QK-norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvit.model.config import CogViTConfig


@dataclass(frozen=True)
class PaddedBatch:
    """B images as rows of N patches, N those of the longest; E values a patch."""

    patches_BNE: Tensor
    place_BN2: Tensor  # int64, row and column
    valid_BN: Tensor  # bool
    grid_B2: Tensor  # int64, rows and columns


def name_torchvision_operators() -> None:
    """Let a torchvision whose binary does not fit torch (CUDA beside a CPU build) be imported; timm needs no operator.

    Its Python half describes these two operators of its binary without a look whether they are there.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class TimmEncoder(nn.Module):
    """timm's NaFlexVit."""

    def __init__(self, cfg: CogViTConfig) -> None:
        super().__init__()
        name_torchvision_operators()
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg  # needs the operators' names

        blocks = NaFlexVitCfg(
            patch_size=cfg.patch_size,
            embed_dim=cfg.embed_dim,
            depth=cfg.depth,
            num_heads=cfg.num_heads,
            mlp_ratio=cfg.mlp_ratio,
            pos_embed_grid_size=cfg.base_grid,
            global_pool="",
        )
        self.encoder = NaFlexVit(blocks, num_classes=0)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return features [B, N, D]."""
        features = self.encoder.forward_features(
            batch.patches_BNE, patch_coord=batch.place_BN2, patch_valid=batch.valid_BN
        )
        return features["patches"]


class TransformersEncoder(nn.Module):
    """transformers' Siglip2VisionModel, without its pooling head."""

    def __init__(self, cfg: CogViTConfig) -> None:
        super().__init__()
        name_torchvision_operators()  # transformers imports a torchvision that it finds
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        shape = Siglip2VisionConfig(
            hidden_size=cfg.embed_dim,
            intermediate_size=cfg.mlp_dim,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads,
            num_patches=cfg.base_grid[0] * cfg.base_grid[1],
            patch_size=cfg.patch_size,
            vision_use_head=False,
        )
        self.encoder = Siglip2VisionModel(shape)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return features [B, N, D]."""
        return self.encoder(
            pixel_values=batch.patches_BNE, pixel_attention_mask=batch.valid_BN, spatial_shapes=batch.grid_B2
        ).last_hidden_state
