"""An independent, slow encoder for one image, written from the reference's description: no packing, no shared code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.model.config import CogViTConfig
from cogvit.model.vit import CogViT

FAMILIES: dict[str, dict[str, object]] = {
    "learned_cls": {},
    "learned": {"use_cls_token": False},
    "rotary_cls": {"position": "rotary"},
    "cogvit_l": {"norm": "rmsnorm", "mlp": "swiglu", "position": "rotary", "use_cls_token": False},
    "norm_after": {"norm_after": True, "use_qk_norm": False},
    "layer_scale": {"layer_scale_init": 0.3, "use_qk_norm": False, "qkv_bias": False, "proj_bias": False},
}


def tiny_config(**options: object) -> CogViTConfig:
    """8-px patches on a 4 x 4 grid, two blocks of width 32."""
    values = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, **options}
    return CogViTConfig(**values)  # type: ignore[arg-type]


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter far from its start, so that no term of the computation can be left out unseen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            center = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=g))


def tiny_vit(**options: object) -> CogViT:
    """A tiny encoder with scrambled weights, in fp64: what differs there is the computation, not its rounding."""
    model = CogViT(tiny_config(**options)).double()
    scramble(model)
    return model


def encode(
    state: Mapping[str, Tensor], cfg: CogViTConfig, image: Tensor, mask_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return patch features [N, D] and the CLS feature of one image [C, H, W]."""
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=cfg.patch_size)
    grid = (x.shape[1], x.shape[2])
    x = x.flatten(1).T
    if mask_N is not None:
        x = torch.stack(
            [state["mask_token"][0, 0] if hidden else token for hidden, token in zip(mask_N, x, strict=True)]
        )
    if cfg.position == "learned":
        table = state["pos_embed.embed"]
        if table.shape[2:] != grid:
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        x = x + table[0].flatten(1).T
    place = torch.tensor([(row, column) for row in range(grid[0]) for column in range(grid[1])], dtype=torch.float32)
    if cfg.use_cls_token:
        x = torch.cat([state["cls_token"][0], x])
        place = torch.cat([torch.zeros(1, 2), place])
    for layer in range(cfg.depth):
        block = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"blocks.{layer}.")}
        if cfg.norm_after:
            x = x + _norm(_attention(block, cfg, x, place), block, "norm1", cfg)
            x = x + _norm(_mlp(block, cfg, x), block, "norm2", cfg)
            continue
        x = x + block.get("ls1.gamma", 1.0) * _attention(block, cfg, _norm(x, block, "norm1", cfg), place)
        x = x + block.get("ls2.gamma", 1.0) * _mlp(block, cfg, _norm(x, block, "norm2", cfg))
    x = x if cfg.norm_after else _norm(x, state, "norm", cfg)
    return (x[1:], x[0]) if cfg.use_cls_token else (x, None)


def _norm(x: Tensor, state: Mapping[str, Tensor], name: str, cfg: CogViTConfig) -> Tensor:
    if cfg.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * state[f"{name}.weight"]
    return x + state[f"{name}.bias"] if cfg.norm == "layernorm" else x


def _attention(block: Mapping[str, Tensor], cfg: CogViTConfig, x: Tensor, place: Tensor) -> Tensor:
    qkv = F.linear(x, block["attn.qkv.weight"], block.get("attn.qkv.bias"))
    heads = []
    for head in range(cfg.num_heads):
        q, k, v = (part[:, head * cfg.head_dim : (head + 1) * cfg.head_dim] for part in qkv.chunk(3, dim=1))
        if cfg.use_qk_norm:
            q, k = _norm(q, block, "attn.q_norm", cfg), _norm(k, block, "attn.k_norm", cfg)
        if cfg.position == "rotary":
            q, k = _rotate(q, place), _rotate(k, place)
        heads.append(torch.softmax(q @ k.T / cfg.head_dim**0.5, dim=1) @ v)
    return F.linear(torch.cat(heads, dim=1), block["attn.proj.weight"], block.get("attn.proj.bias"))


def _rotate(x: Tensor, place: Tensor) -> Tensor:
    """As complex numbers: channel i with channel i + K / 2; a quarter of the angles by row, the next by column."""
    half = x.shape[1] // 2
    frequency = 10000.0 ** (-torch.arange(half // 2) * 2 / half)
    angle = torch.cat([place[:, :1] * frequency, place[:, 1:] * frequency], dim=1)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=1)


def _mlp(block: Mapping[str, Tensor], cfg: CogViTConfig, x: Tensor) -> Tensor:
    h = F.linear(x, block["mlp.fc1.weight"], block["mlp.fc1.bias"])
    if cfg.mlp == "swiglu":
        gate, up = h[:, : cfg.mlp_dim], h[:, cfg.mlp_dim :]
        h = gate * torch.sigmoid(gate) * up
    else:
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    return F.linear(h, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
