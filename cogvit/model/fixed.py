"""The encoder for images of one size, as a batch without packs: what torch.export, ONNX and torch.compile take whole.

A pack's layout depends on its images, which no traced graph can follow; on one grid everything is known beforehand.
"""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvit.errors import ConfigError
from cogvit.model.blocks import Attention, Block
from cogvit.model.interop import PROCESSOR
from cogvit.model.layouts.files import write_json
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

    def _block(self, block: nn.Module, x_BSD: Tensor) -> Tensor:
        assert isinstance(block, Block)
        if block.norm_after:
            x_BSD = x_BSD + block.ls1(block.norm1(self._attention(block.attn, x_BSD)))
            return x_BSD + block.ls2(block.norm2(block.mlp(x_BSD)))
        x_BSD = x_BSD + block.ls1(self._attention(block.attn, block.norm1(x_BSD)))
        return x_BSD + block.ls2(block.mlp(block.norm2(x_BSD)))

    def _attention(self, attn: Attention, x_BSD: Tensor) -> Tensor:
        q, k, v = rearrange(attn.qkv(x_BSD), "b s (three h k) -> three b s h k", three=3, h=attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if isinstance(self.cos_SK, Tensor) and isinstance(self.sin_SK, Tensor):
            q, k = apply_rotary(q, self.cos_SK, self.sin_SK), apply_rotary(k, self.cos_SK, self.sin_SK)
        q_BHSK, k_BHSK, v_BHSK = (rearrange(x.to(v.dtype), "b s h k -> b h s k") for x in (q, k, v))
        gathered_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK)
        return attn.proj(rearrange(gathered_BHSK, "b h s k -> b s (h k)"))


def write_program(directory: Path, vit: CogViT, grid: Grid, file: Literal["onnx", "pt2"]) -> Path:
    """Write an encoder on one grid as a graph for other runtimes, beside a preprocessor_config.json.

    Returns the file. It takes "images", floats [B, C, H, W] in [-1, 1] of any B, and gives "patch_features" [B, N, D]
    and "pooled" [B, D].
    pt2 is for torch.export.load, onnx for any ONNX runtime.

    Errors: ConfigError when onnxscript, which writes ONNX, is not installed.
    """
    encoder = FixedGridEncoder(vit.float().cpu(), grid).eval()
    images = torch.zeros(2, vit.cfg.in_chans, *encoder.size_hw_px)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        program = torch.export.export(encoder, (images,), dynamic_shapes=({0: batch},))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"model.{file}"
        if file == "pt2":
            torch.export.save(program, path)
        else:
            _write_onnx(program, path)
    one_size = replace(vit.preprocessing, square=True, max_patches=grid[0] * grid[1])
    values = one_size.to_json(vit.cfg) | {"size": {"height": encoder.size_hw_px[0], "width": encoder.size_hw_px[1]}}
    write_json(directory / PROCESSOR, values)
    return path


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    if find_spec("onnxscript") is None:
        raise ConfigError("--layout onnx needs onnxscript; pip install 'cogvit[export]', or take --layout torch_export")
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # torchvision's operators are told to be missing, which no encoder has
    try:
        with redirect_stdout(io.StringIO()):
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["patch_features", "pooled"],
            )
        assert onnx is not None
        onnx.save(path)
    finally:
        log.setLevel(level)
