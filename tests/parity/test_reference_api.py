"""The reference build's README: every snippet runs with `from cogvit import ...`, and its checkpoints fit."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvit import (
    CogViT,
    CogViTConfig,
    CogViTForContrastive,
    CogViTForMIM,
    MLPAdapter,
    SigLIPLoss,
    TeacherWrapper,
    build_param_groups,
    insert_visual_tokens_mmtp,
    naflex_collate,
    naflex_resize,
    naflex_target_size,
)

IMAGE_TOKEN_ID = 151_655


class PooledText(nn.Module):
    """Any text encoder of the reference: (input_ids, attention_mask) to pooled features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1)
        return (self.embed(input_ids) * weight).sum(1) / weight.sum(1)


class PatchFeatures(nn.Module):
    """Any teacher of the reference: images to features of a 16 x 16 grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 14, stride=14)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def test_encoder_and_adapter_snippets_at_their_real_size() -> None:
    cfg = CogViTConfig(
        image_size=224,
        patch_size=14,
        embed_dim=1024,
        depth=24,
        num_heads=16,
    )
    vit = CogViT(cfg)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        out = vit(images)
    assert out["patch_tokens"].shape == (2, 256, 1024)
    assert out["cls_token"] is not None
    assert out["cls_token"].shape == (2, 1024)
    assert out["grid"] == (16, 16)
    assert sum(p.numel() for p in vit.parameters()) == 303_184_896

    adapter = MLPAdapter(
        vision_dim=1024,
        llm_dim=4096,
        spatial_pool=2,
    )
    visual_embeds = adapter(out["patch_tokens"], out["grid"])
    assert visual_embeds.shape == (2, 64, 4096)
    text_embeds = torch.randn(2, 80, 4096)
    input_ids = torch.ones(2, 80, dtype=torch.int64)
    input_ids[:, 5:69] = IMAGE_TOKEN_ID
    fused = insert_visual_tokens_mmtp(
        text_embeds=text_embeds,
        visual_embeds=visual_embeds,
        image_token_id=IMAGE_TOKEN_ID,
        input_ids=input_ids,
    )
    assert torch.equal(fused[:, 5:69], visual_embeds)
    assert torch.equal(fused[:, 69:], text_embeds[:, 69:])


def test_naflex_snippet() -> None:
    cfg = CogViTConfig(naflex_max_tokens=1024, depth=1, embed_dim=64, num_heads=4)
    vit = CogViT(cfg)
    images = [torch.randn(3, 480, 640), torch.randn(3, 720, 480)]
    batch, valid_mask = naflex_collate(images, patch_size=cfg.patch_size, max_tokens=1024)
    out = vit(batch, valid_mask=valid_mask)
    sizes = [naflex_target_size(*image.shape[1:], 14, 1024) for image in images]
    assert valid_mask.sum(1).tolist() == [h * w // 14**2 for h, w in sizes] == [27 * 36, 39 * 26]
    assert out["patch_tokens"].shape == (2, 39 * 26, 64)
    assert valid_mask.shape[1] <= 1024
    assert naflex_resize(images[0], 14, 1024).shape[1:] == sizes[0]


def test_stage_1_snippet() -> None:
    cfg = CogViTConfig(depth=2, embed_dim=64, num_heads=4)
    student = CogViT(cfg)
    siglip2_model, dinov3_model = PatchFeatures(1152), PatchFeatures(1024)
    mim = CogViTForMIM(
        encoder=student,
        teachers={
            "siglip2": TeacherWrapper(siglip2_model, feature_dim=1152, out_grid=(16, 16)),
            "dinov3": TeacherWrapper(dinov3_model, feature_dim=1024, out_grid=(16, 16)),
        },
        mask_ratio=0.35,
    )
    images = torch.randn(8, 3, 224, 224)
    out = mim(images)
    out["total"].backward()
    assert set(out) == {"siglip2", "dinov3", "total", "mask"}
    assert out["mask"].shape == (8, 256)
    assert all(p.grad is not None for name, p in mim.named_parameters() if name != "encoder.cls_token")


def test_stage_2_and_recipe_snippets() -> None:
    vision = CogViT(CogViTConfig(depth=2, embed_dim=64, num_heads=4))
    my_text_encoder = PooledText(1024)
    clip = CogViTForContrastive(
        vision=vision,
        text_encoder=my_text_encoder,
        text_dim=1024,
        proj_dim=768,
        loss=SigLIPLoss(init_t=10.0, init_b=-10.0),
    )
    images, valid_mask = naflex_collate([torch.randn(3, 48, 64), torch.randn(3, 72, 48)], 14, max_tokens=64)
    input_ids = torch.randint(0, 100, (2, 7))
    attention_mask = torch.ones(2, 7)
    out = clip(
        images=images,
        input_ids=input_ids,
        attention_mask=attention_mask,
        valid_mask=valid_mask,
    )
    out["loss"].backward()
    assert out["image_embed"].shape == out["text_embed"].shape == (2, 768)

    param_groups: Any = build_param_groups(
        ("vision", clip.vision, 1.0),
        ("text", clip.text_encoder, 0.5),
        ("vision_proj", clip.vision_proj, 1.0),
        ("text_proj", clip.text_proj, 1.0),
        weight_decay=0.05,
    )
    optim = torch.optim.AdamW(param_groups, lr=1e-3)
    optim.step()
    assert {"name", "params", "weight_decay", "lr_mult"} <= set(optim.param_groups[0])


def test_state_dict_is_the_references() -> None:
    with torch.device("meta"):
        state = CogViT(CogViTConfig(layer_scale_init=1e-5)).state_dict()
    block = {
        "norm1.weight": (1024,),
        "norm1.bias": (1024,),
        "attn.qkv.weight": (3072, 1024),
        "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024),
        "attn.proj.bias": (1024,),
        "attn.q_norm.weight": (64,),
        "attn.q_norm.bias": (64,),
        "attn.k_norm.weight": (64,),
        "attn.k_norm.bias": (64,),
        "norm2.weight": (1024,),
        "norm2.bias": (1024,),
        "mlp.fc1.weight": (4096, 1024),
        "mlp.fc1.bias": (4096,),
        "mlp.fc2.weight": (1024, 4096),
        "mlp.fc2.bias": (1024,),
        "ls1.gamma": (1024,),
        "ls2.gamma": (1024,),
    }
    expected = {
        "patch_embed.proj.weight": (1024, 3, 14, 14),
        "patch_embed.proj.bias": (1024,),
        "pos_embed.embed": (1, 1024, 16, 16),
        "mask_token": (1, 1, 1024),
        "cls_token": (1, 1, 1024),
        **{f"blocks.{layer}.{name}": shape for layer in range(24) for name, shape in block.items()},
        "norm.weight": (1024,),
        "norm.bias": (1024,),
    }
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_options_leave_out_their_keys() -> None:
    with torch.device("meta"):
        plain = set(CogViT(CogViTConfig(depth=1)).state_dict())
        bare = set(CogViT(CogViTConfig(depth=1, use_cls_token=False, use_qk_norm=False, qkv_bias=False)).state_dict())
    norms = {f"blocks.0.attn.{which}_norm.{kind}" for which in "qk" for kind in ("weight", "bias")}
    assert plain - bare == {"cls_token", "blocks.0.attn.qkv.bias", *norms}
    assert bare < plain


@pytest.mark.parametrize(
    ("call", "defaults"),
    [
        (
            CogViTConfig,
            {
                "image_size": 224,
                "patch_size": 14,
                "in_chans": 3,
                "embed_dim": 1024,
                "depth": 24,
                "num_heads": 16,
                "mlp_ratio": 4.0,
                "qkv_bias": True,
                "proj_bias": True,
                "use_qk_norm": True,
                "use_cls_token": True,
                "drop_path_rate": 0.0,
                "layer_scale_init": None,
                "naflex_max_tokens": 1024,
                "eps": 1e-6,
            },
        ),
        (CogViT.forward, {"mask": None, "valid_mask": None}),
        (MLPAdapter, {"hidden_dim": None, "spatial_pool": 1}),
        (TeacherWrapper, {"out_grid": None}),
        (CogViTForMIM, {"mask_ratio": 0.35, "loss_weights": None}),
        (SigLIPLoss, {"init_t": 10.0, "init_b": -10.0}),
        (CogViTForContrastive, {"proj_dim": 768, "loss": None}),
        (CogViTForContrastive.forward, {"valid_mask": None}),
        (build_param_groups, {"weight_decay": 0.05}),
    ],
)
def test_defaults_are_the_references(call: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(call).parameters
    optional = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert list(optional)[: len(defaults)] == list(defaults)
    assert {name: optional[name] for name in defaults} == defaults


def test_derived_values_of_the_configuration() -> None:
    cfg = CogViTConfig()
    assert (cfg.head_dim, cfg.base_grid) == (64, (16, 16))


IMPORT = """
import sys
import torch
before = set(sys.modules)
import cogvit
new = set(sys.modules) - before
others = sorted(name for name in new if name.partition(".")[0] not in ("cogvit", "einops"))
assert "einops" in new and not others, others
"""


def test_import_needs_torch_and_einops_alone() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
