"""Stage 2 in plain PyTorch: the sigmoid loss on one and on several ranks, and what trains with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogvit.model.config import TextConfig
from cogvit.model.contrastive import CogViTForContrastive, SigLIPLoss
from cogvit.model.param_groups import apply_lr_mult, build_param_groups
from cogvit.model.text import TextTower
from tests.largest_tensor import LargestTensor
from tests.plain_vit import tiny_vit
from tests.pool import Pool


def full_matrix(image: Tensor, text: Tensor, log_t: Tensor, bias: Tensor) -> Tensor:
    """The loss as it is written in the paper, per image."""
    logits = log_t.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    labels = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


class TestLoss:
    @pytest.mark.parametrize("num_pairs", [1, 7, 4100])  # the last takes more than one block
    def test_equals_the_full_matrix_with_gradients(self, num_pairs: int) -> None:
        loss = SigLIPLoss(init_t=3.0, init_b=-1.0)
        inputs = [torch.randn(num_pairs, 6, requires_grad=True) for _ in range(2)]
        ours, expected = loss(*inputs), full_matrix(*inputs, loss.log_t, loss.bias)
        torch.testing.assert_close(ours, expected)
        leaves = [*inputs, loss.log_t, loss.bias]
        for grad, other in zip(
            torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
        ):
            torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)

    def test_the_references_mean_over_pairs_by_name(self) -> None:
        inputs = torch.randn(2, 5, 6)
        torch.testing.assert_close(SigLIPLoss(normalization="pairs")(*inputs) * 5, SigLIPLoss()(*inputs))

    def test_starts_where_it_is_told(self) -> None:
        loss = SigLIPLoss(init_t=20.0, init_b=-3.0)
        assert loss.log_t.item() == pytest.approx(math.log(20.0))
        assert loss.bias.item() == -3.0
        assert loss.log_t.shape == loss.bias.shape == ()

    def test_is_fp32_under_autocast(self) -> None:
        inputs = torch.randn(2, 5, 64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = SigLIPLoss()(*inputs)
        assert torch.equal(loss, SigLIPLoss()(*inputs))

    def test_bad_input(self) -> None:
        loss = SigLIPLoss()
        for image, text in ((torch.rand(3, 4), torch.rand(2, 4)), (torch.rand(4), torch.rand(4)), torch.rand(2, 0, 4)):
            with pytest.raises(ValueError, match=r"must share the shape \(B, E\)"):
                loss(image, text)
        with pytest.raises(ValueError, match=r"init_t=0.0"):
            SigLIPLoss(init_t=0.0)
        with pytest.raises(ValueError, match="normalization='mean'"):
            SigLIPLoss(normalization="mean")  # type: ignore[arg-type]


class TwoLinears(nn.Module):
    """Two towers of one layer each and the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.loss = nn.Linear(5, 4), nn.Linear(6, 4), SigLIPLoss(2.0, -1.0)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(self.image(image), self.text(text))


def pairs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=g), torch.randn(12, 6, generator=g)


def train_on_a_share(rank: int, world: int) -> tuple[float, dict[str, Tensor]]:
    model = DistributedDataParallel(TwoLinears())
    loss = model(*(x.chunk(world)[rank] for x in pairs()))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def largest_tensor(rank: int, world: int) -> int:
    inputs = [torch.randn(64, 2, requires_grad=True) for _ in range(2)]
    with LargestTensor() as largest:
        SigLIPLoss()(*inputs).backward()
    return largest.elements


def bring_unequal_numbers(rank: int, world: int) -> Any:
    SigLIPLoss()(torch.rand(2 + rank, 4), torch.rand(2 + rank, 4))


def bring_what_does_not_fit(rank: int, world: int) -> list[str]:
    """Rank 1 brings no pair, then images and texts of different shapes, then other channels."""
    found = []
    for image, text in (((3 - 3 * rank, 4),) * 2, ((3, 4), (3 - rank, 4)), ((3, 4 + rank),) * 2):
        with pytest.raises(ValueError) as refusal:
            SigLIPLoss()(torch.rand(*image), torch.rand(*text))
        found.append(str(refusal.value))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_gives_the_loss_and_gradients_of_one_process(pool: Pool, world: int) -> None:
    alone = TwoLinears()
    loss = alone(*pairs())
    loss.backward()
    for value, grads in pool.run(train_on_a_share, world):
        assert value == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_no_rank_builds_all_logits(pool: Pool) -> None:
    assert pool.run(largest_tensor, 3) == [64 * 64] * 3


def test_unequal_numbers_of_pairs_are_refused_on_every_rank(pool: Pool) -> None:
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"ranks bring \[2, 3\] pairs"):
        pool.run(bring_unequal_numbers, 2)


def test_no_rank_waits_for_one_whose_shapes_are_wrong(pool: Pool) -> None:
    waiting, wrong = pool.run(bring_what_does_not_fit, 2)
    assert "[3, 0] pairs of [4, 0] channels" in waiting[0] and "[3, 0] pairs" in waiting[1]
    assert all("must share the shape (B, E)" in message for message in wrong[:2])
    assert "of [4, 5] channels" in waiting[2] and waiting[2] == wrong[2]


def build() -> CogViTForContrastive:
    text = TextTower(TextConfig(max_tokens=8, embed_dim=16, depth=2, num_heads=2))
    return CogViTForContrastive(tiny_vit().float(), text, text_dim=16, proj_dim=12)


def batch() -> dict[str, Tensor]:
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[1, 2:] = False
    return {
        "images": torch.randn(3, 3, 32, 32),
        "input_ids": torch.randint(0, 384, (3, 8)),
        "attention_mask": torch.ones(3, 8, dtype=torch.int64),
        "valid_mask": valid.flatten(1),
    }


class TestTwoTowers:
    def test_pools_valid_patches_and_projects(self) -> None:
        model, given = build(), batch()
        out = model(**given)
        patches = model.vision(given["images"], valid_mask=given["valid_mask"])["patch_tokens"]
        pooled = torch.stack([patches[0].mean(0), patches[1, :8].mean(0), patches[2].mean(0)])
        torch.testing.assert_close(out["image_embed"], model.vision_proj(pooled))
        text = model.text_proj(model.text_encoder(given["input_ids"], given["attention_mask"]))
        torch.testing.assert_close(out["text_embed"], text)
        torch.testing.assert_close(out["loss"], model.loss_fn(out["image_embed"], out["text_embed"]))
        assert out["image_embed"].shape == (3, 12)

    def test_other_text_features_are_refused(self) -> None:
        model, given = build(), batch()
        for gives, message in (
            (torch.zeros(3, 8, 16), r"gave shape \(3, 8, 16\); expected .* \(3, 16\)"),
            ({"pooler_output": torch.zeros(3, 16)}, "gave a dict; expected"),
        ):
            model.text_encoder.register_forward_hook(lambda *call, gives=gives: gives)
            with pytest.raises(ValueError, match=message):
                model(**given)

    def test_keys_outside_the_towers_are_the_references(self) -> None:
        keys = {key for key in build().state_dict() if not key.startswith(("vision.", "text_encoder."))}
        assert keys == {"vision_proj.weight", "text_proj.weight", "loss_fn.log_t", "loss_fn.bias"}


def recipe(model: CogViTForContrastive) -> list[Any]:
    """The reference's recipe, which names no loss."""
    return build_param_groups(
        ("vision", model.vision, 1.0),
        ("text", model.text_encoder, 0.5),
        ("vision_proj", model.vision_proj, 1.0),
        ("text_proj", model.text_proj, 1.0),
    )


class TestParamGroups:
    def test_every_parameter_is_in_one_group(self) -> None:
        model = build()
        listed = [p for group in recipe(model) for p in group["params"]]
        assert len(listed) == len(set(listed)) == len(list(model.parameters()))

    def test_the_recipe_trains_temperature_and_bias(self) -> None:
        model = build()
        start = model.loss_fn.log_t.item(), model.loss_fn.bias.item()
        optimizer = torch.optim.AdamW(recipe(model), lr=1e-3)
        model(**batch())["loss"].backward()
        optimizer.step()
        assert model.loss_fn.log_t.item() != start[0]
        assert model.loss_fn.bias.item() != start[1]

    def test_a_loss_that_is_listed_is_not_listed_twice(self) -> None:
        model = build()
        groups = build_param_groups(("tower", model.vision_proj, 1.0), ("loss", model.loss_fn, 0.1))
        assert [(group["name"], group["lr_mult"]) for group in groups] == [("tower.decay", 1.0), ("loss.nodecay", 0.1)]

    def test_matrices_decay_and_nothing_else(self) -> None:
        model = build()
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = recipe(model)
        decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
        assert {"vision.patch_embed.proj.weight", "vision_proj.weight"} <= decayed
        exempt = set(names.values()) - decayed
        tables = {"vision.cls_token", "vision.mask_token", "vision.pos_embed.embed"}
        tables |= {"text_encoder.token_embed.weight", "text_encoder.pos_embed.weight"}
        assert {name for name in exempt if dict(model.named_parameters())[name].ndim > 1} == tables
        assert all(dict(model.named_parameters())[name].ndim > 1 for name in decayed)
        assert {group["weight_decay"] for group in groups} == {0.05, 0.0}

    def test_frozen_parameters_are_left_out_and_names_can_be_chosen(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).requires_grad_(False))
        assert [len(group["params"]) for group in build_param_groups(("m", model, 1.0))] == [1]
        (group,) = build_param_groups(("m", model, 1.0), no_decay_names=("0.weight",))
        assert (group["name"], group["weight_decay"]) == ("m.nodecay", 0.0)

    def test_multipliers_survive_a_plain_scheduler(self) -> None:
        optimizer = torch.optim.AdamW(recipe(build()), lr=1e-3)
        apply_lr_mult(optimizer)
        apply_lr_mult(optimizer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
            rates = {group["name"].split(".")[0]: group["lr"] for group in optimizer.param_groups}
            assert rates["text"] == pytest.approx(0.5 * rates["vision"])
            assert rates["vision"] < 1e-3
