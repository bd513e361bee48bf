"""The encoder for images of one size, as a batch without packs: what torch.export, ONNX and torch.compile take whole.

A pack's layout depends on its images, which no traced graph can follow; on one grid everything is known beforehand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.model.blocks import Attention, Block
from cogvit.model.packing import Grid, raster
from cogvit.model.position import apply_rotary, rotary_2d
from cogvit.model.vit import CogViT


class FixedGridEncoder(nn.Module):
    """`CogViT` on images of one grid, with its own weights; inference only.

    Attributes:
        vit: the encoder, whose weights these are.
        grid: rows and columns of patches.

    Errors: ValueError when a side of the grid is not positive.
    """

    def __init__(self, vit: CogViT, grid: Grid) -> None:
        """Take an encoder for images of rows * P by columns * P px."""
        super().__init__()
        if min(grid) < 1:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches has none; both sides must be at least 1")
        self.vit, self.grid = vit, grid
        kernel, cfg = vit.patch_embed.proj.weight, vit.cfg
        row_col_S2 = raster(*grid)
        if cfg.use_cls_token:
            row_col_S2 = F.pad(row_col_S2, (0, 0, 1, 0))
        with torch.no_grad():
            table_ND = None if vit.pos_embed is None else vit.pos_embed.on_grid(*grid).clone()
        cos_SK, sin_SK = rotary_2d(row_col_S2.to(kernel.device), cfg.head_dim)
        self.register_buffer("table_ND", table_ND, persistent=False)
        rotary = cfg.position == "rotary"
        self.register_buffer("cos_SK", cos_SK if rotary else None, persistent=False)
        self.register_buffer("sin_SK", sin_SK if rotary else None, persistent=False)

    @property
    def size_hw_px(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.grid[0] * self.vit.cfg.patch_size, self.grid[1] * self.vit.cfg.patch_size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images [B, C, H, W], floats in [-1, 1]: patch features [B, N, D] and their mean [B, D]."""
        vit = self.vit
        x_BSD = rearrange(vit.patch_embed.proj(images), "b d rows columns -> b (rows columns) d")
        if self.table_ND is not None:
            x_BSD = x_BSD + self.table_ND
        if vit.cls_token is not None:
            x_BSD = torch.cat([vit.cls_token.expand(images.shape[0], -1, -1), x_BSD], dim=1)
        for block in vit.blocks:
            x_BSD = self._block(block, x_BSD)
        x_BSD = vit.norm(x_BSD)
        patches_BND = x_BSD if vit.cls_token is None else x_BSD[:, 1:]
        return patches_BND, patches_BND.mean(dim=1)

    def _block(self, block: Block, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + block.ls1(self._attention(block.attn, block.norm1(x_BSD)))
        return x_BSD + block.ls2(block.mlp(block.norm2(x_BSD)))

    def _attention(self, attn: Attention, x_BSD: Tensor) -> Tensor:
        q, k, v = rearrange(attn.qkv(x_BSD), "b s (three h k) -> three b s h k", three=3, h=attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if self.cos_SK is not None:
            q, k = (apply_rotary(x, self.cos_SK, self.sin_SK) for x in (q, k))
        q_BHSK, k_BHSK, v_BHSK = (rearrange(x.to(v.dtype), "b s h k -> b h s k") for x in (q, k, v))
        gathered_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK)
        return attn.proj(rearrange(gathered_BHSK, "b h s k -> b s (h k)"))
