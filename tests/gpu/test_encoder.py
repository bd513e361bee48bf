"""The plain encoder on the GPU: the CPU's numbers in fp32, its draws to the bit, bf16 gradients near fp32's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cogvit.batch import PackedImages, to_device
from cogvit.draws import mix, uniform
from cogvit.model.vit import CogViT
from cogvit.objective.masking import mask_tokens
from tests.packs import random_images
from tests.plain_vit import FAMILIES, scramble, tiny_config

family = pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)


def model_of(options: dict[str, object]) -> CogViT:
    """Wide enough for the kernels of bf16 attention: heads of 32 channels."""
    model = CogViT(tiny_config(embed_dim=128, drop_path_rate=0.3, **options))
    scramble(model)
    return model


def float_pack() -> PackedImages:
    images = random_images(3, num_tokens=80)
    return replace(images, patches=torch.randn(images.patches.shape, generator=torch.Generator().manual_seed(0)))


def features_and_gradients(model: nn.Module, images: PackedImages) -> dict[str, Tensor]:
    """Valid features and every parameter's gradient, on the CPU."""
    mask = mask_tokens(images, 0.35)
    out = model.forward_packed(images, mask)  # type: ignore[operator]
    valid = int(images.cu_seqlens[-2])
    weight = torch.randn(128, generator=torch.Generator().manual_seed(1)).to(out.patch_TD)
    loss = (out.patch_TD[:valid].float() @ weight.float()).mean()
    if out.cls_ND is not None:
        loss = loss + (out.cls_ND.float() @ weight.float() * images.weight).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return {name: x.detach().cpu().double() for name, x in {**found, "features": out.patch_TD[:valid]}.items()}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each within a share of its norm; gradients that are zero by nature, within that share of the largest."""
    largest = max(x.norm() for x in expected.values())
    for name, exactly in expected.items():
        scale = largest if name.endswith("k_norm.bias") else exactly.norm()
        assert (actual[name] - exactly).norm() <= tolerance * scale, name


@family
def test_fp32_has_the_cpus_features_and_gradients(options: dict[str, object], device: torch.device) -> None:
    model, images = model_of(options), float_pack()
    expected = features_and_gradients(model, images)
    assert_near(features_and_gradients(model.to(device), to_device(images, device)), expected, 1e-4)


@family
def test_a_pack_equals_its_images_one_by_one(options: dict[str, object], device: torch.device) -> None:
    model = model_of(options).to(device).eval()
    pictures = [torch.randn(1, 3, 8 * rows, 8 * columns, device=device) for rows, columns in ((2, 3), (4, 4), (5, 1))]
    canvas = torch.zeros(3, 3, 40, 32, device=device)
    valid = torch.zeros(3, 5, 4, dtype=torch.bool, device=device)
    for n, picture in enumerate(pictures):
        canvas[n, :, : picture.shape[2], : picture.shape[3]] = picture[0]
        valid[n, : picture.shape[2] // 8, : picture.shape[3] // 8] = True
    with torch.no_grad():
        together = model(canvas, valid_mask=valid.flatten(1))["patch_tokens"]
        for n, picture in enumerate(pictures):
            alone = model(picture)["patch_tokens"][0]
            assert (together[n][valid[n].flatten()] - alone).norm() <= 1e-5 * alone.norm()


@family
def test_bf16_gradients_are_near_fp32_tensor_by_tensor(options: dict[str, object], device: torch.device) -> None:
    model, images = model_of(options).to(device), to_device(float_pack(), device)
    expected = features_and_gradients(model, images)
    with torch.autocast("cuda", torch.bfloat16):
        actual = features_and_gradients(model, images)
    assert_near(actual, expected, 0.1)


@family
def test_recompute_changes_nothing(options: dict[str, object], device: torch.device) -> None:
    model, images = model_of(options).to(device), to_device(float_pack(), device)
    again = copy.deepcopy(model)
    again.recompute = True
    assert_near(features_and_gradients(again, images), features_and_gradients(model, images), 1e-6)


def test_draws_are_the_cpus_to_the_bit(device: torch.device) -> None:
    images = random_images(5)
    moved = to_device(images, device)
    key = mix(torch.arange(10_000), 9)
    assert torch.equal(uniform(key.to(device), 3, 7).cpu(), uniform(key, 3, 7))
    assert torch.equal(mask_tokens(moved, 0.35).cpu(), mask_tokens(images, 0.35))


def test_uint8_patches_are_normalized_alike(device: torch.device) -> None:
    model, images = model_of({}).eval(), random_images(5)
    expected = model.patch_embed(images.patches)
    actual = model.to(device).patch_embed(images.patches.to(device)).cpu()
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
