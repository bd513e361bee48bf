"""Tiny models of the CogVLM family in their released form, whose weights are a formula of their names.

`golden/cog.json` holds what the released modeling code said of them: Niky-san/cogvlm2_surce for CogVLM2, the same
without convolution, key-value groups and biases for CogVLM, aredden/faster-cogagent-chat with the released cross
attention for CogAgent, XuRui314/GLM4v-Finetune with the released visual.py for GLM-4V-9B; xformers, triton, apex and
timm were replaced by torch's own operations.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cogvit.model.layouts.parts import flat
from cogvit.model.layouts.released import Layout, carried, parts, read_shape

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "cog.json").read_text())
_CROSS = "model.cross_vision."
_CROSS_SHAPES = {  # what CogAgent's config.json does not say: 2 heads of 64, 3 blocks, patches of 14 px
    f"{_CROSS}vit.model.patch_embed.proj.weight": (128, 3, 14, 14),
    f"{_CROSS}vit.model.blocks.0.mlp.w1.weight": (341, 128),
    f"{_CROSS}vit.model.blocks.2.norm1.weight": (128,),
    f"{_CROSS}vit.model.head.weight": (12, 128),
    f"{_CROSS}pos_embed": (36, 128),
}


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that look random and are the same everywhere: a hash of a name and of places."""
    x = (torch.arange(torch.Size(shape).numel()) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    for _ in range(2):
        x = (x ^ (x >> 16)) * 73244475 % 2**32
    u = ((x ^ (x >> 16)).double() / 2**32 - 0.5).float().view(shape)
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.4 * u
    return (0.8 if any(part in name for part in ("embed", "boi", "eoi")) else 0.25) * u


def cog_picture(height_px: int, width_px: int, seed: int = 0) -> Image.Image:
    """One of the images of the golden logits."""
    noise = ((formula(f"image{seed}", (6, 6, 3)) / 0.25 + 0.5) * 255).to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(noise)).resize((width_px, height_px), Image.Resampling.BILINEAR)


def cog_tensors(layout: Layout, **options: Any) -> dict[str, Tensor]:
    """A tiny model's tensors under their released names, angles as the released code computes them."""
    shape = read_shape(layout, GOLDEN[layout]["config"] | options, _CROSS_SHAPES)
    found: dict[str, Tensor] = {}
    for name, size in (flat(parts(layout, shape)) | carried(layout, shape, _CROSS_SHAPES)).items():
        base = 500000 if layout == "cogvlm2" else 10000
        if name.endswith("inv_freq"):
            found[name] = 1.0 / (base ** (torch.arange(0, 2 * size[0], 2) / (2 * size[0])))
        elif "freqs_" in name:
            frequency = 1.0 / (10000 ** (torch.arange(0, 32, 2)[:16].float() / 32))
            angle = torch.einsum("t,f->tf", torch.arange(6) / 6 * 16, frequency).repeat_interleave(2, dim=1)
            both = torch.cat([angle[:, None].expand(6, 6, 32), angle[None].expand(6, 6, 32)], dim=-1).reshape(size)
            found[name] = both.cos() if name.endswith("cos") else both.sin()
        else:
            found[name] = formula(name, size)
    return found


def cog_directory(layout: Layout, directory: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """A released directory in one file; CogVLM2 in bf16, as released, unless another type is given."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = dtype or (torch.bfloat16 if layout == "cogvlm2" else torch.float32)
    tensors = {name: tensor.to(kind).contiguous() for name, tensor in cog_tensors(layout, **options).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(GOLDEN[layout]["config"] | options))
    return directory
