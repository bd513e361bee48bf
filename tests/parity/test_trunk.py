"""What is trained on Megatron's layers is the plain model: one step's loss and every gradient, both stages by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.batch import Batch
from cogvit.model.text import TextTower
from cogvit.model.tokens import pool_mean
from cogvit.model.vit import CogViT
from cogvit.objective.masking import mask_tokens
from cogvit.parallel.mesh import start_mesh
from tests.dist.runs import TERMS, Case, micro_of, run_config, start_engine
from tests.packs import MASK_RATIO
from tests.pool import Pool

Gradients = dict[str, Tensor]


def distill_loss(vision: CogViT, weights: dict[str, Tensor], micro: Sequence[Batch]) -> Tensor:
    """The mean over all masked patches of each teacher's smooth L1, weighted by teacher."""
    total = torch.zeros(())
    masks = [mask_tokens(batch.images, MASK_RATIO) for batch in micro]
    for batch, mask in zip(micro, masks, strict=True):
        student = vision.forward_packed(batch.images, mask).patch_TD[mask]
        for name, term in TERMS.items():
            guess = F.linear(student, weights[f"heads.{name}.weight"], weights[f"heads.{name}.bias"])
            error = F.smooth_l1_loss(guess, batch.targets.features[name], reduction="none").mean(1)
            total = total + term.weight * error.sum()
    return total / sum(int(mask.sum()) for mask in masks)


def contrast_loss(vision: CogViT, text: TextTower, weights: dict[str, Tensor], micro: Sequence[Batch]) -> Tensor:
    """The sigmoid loss of all pairs that are there, without negatives that share a caption or a concept."""
    images, texts, captions, concepts = [], [], [], []
    for batch in micro:
        here = batch.images.weight > 0
        features = vision.forward_packed(batch.images).patch_TD
        pooled = pool_mean(features, batch.images.segment(), batch.images.num_slots)
        images.append(F.linear(pooled, weights["vision_proj.weight"], weights["vision_proj.bias"])[here])
        pooled = text.forward_packed(batch.text, batch.images.key)
        texts.append(F.linear(pooled, weights["text_proj.weight"], weights["text_proj.bias"])[here])
        captions.append(batch.text.caption_id[here])
        concepts.append(batch.text.concept_id[here])
    image, text_embed = (F.normalize(torch.cat(x), dim=1) for x in (images, texts))
    logits = weights["log_t"].exp() * image @ text_embed.T + weights["bias"]
    same = torch.zeros_like(logits, dtype=torch.bool)
    for ids in (torch.cat(captions), torch.cat(concepts)):
        same |= ids[:, None] == ids
    paired = torch.eye(len(logits), dtype=torch.bool)
    negatives = F.softplus(logits)[~same & ~paired].sum()
    return (F.softplus(-logits.diagonal()).sum() + negatives) / len(logits)


def both_ways(rank: int, world: int, case: Case) -> tuple[float, Gradients, float, Gradients]:
    """Loss and gradients of the engine, and of the plain modules with its weights."""
    config, mesh = run_config(case), start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    micro = micro_of(case, mesh)
    state = {key: tensor.clone() for key, tensor in engine.plain_state() if key.startswith("master/")}
    weights = {key.removeprefix("master/"): nn.Parameter(tensor) for key, tensor in state.items()}
    towers = {"vision": CogViT(config.vision), "text": TextTower(config.text)}
    for prefix, tower in towers.items():
        own = {name: w for name, w in weights.items() if name.startswith(f"{prefix}.")}
        if own:
            tower.train().load_state_dict({name.removeprefix(f"{prefix}."): w for name, w in own.items()})
            weights |= {f"{prefix}.{name}": parameter for name, parameter in tower.named_parameters()}
    if case.stage == "distill":
        loss = distill_loss(towers["vision"], weights, micro)
    else:
        loss = contrast_loss(towers["vision"], towers["text"], weights, micro)
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    plain = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), grads, strict=True)}
    trained = {name: gradient.clone() for name, gradient in engine.plain_gradients(objective, micro)}
    return engine.step(objective, micro, 0).terms["loss"], trained, float(loss), plain


@pytest.mark.parametrize("stage", ["distill", "contrast"])
@pytest.mark.parametrize("family", ["reference", "cogvit_l"])
def test_the_engine_trains_the_plain_model(pool: Pool, stage: str, family: str) -> None:
    loss, trained, expected_loss, plain = pool.run(both_ways, 1, (Case(stage=stage, family=family),))[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert trained.keys() == plain.keys()
    for name, gradient in plain.items():
        error = (trained[name] - gradient).norm()
        noise = (
            1e-6 if name.endswith("k_norm.bias") or name == "bias" else 0.0
        )  # 0 by nature; a difference of large sums
        assert error <= 1e-5 * gradient.norm() + noise, f"{name}: {error / gradient.norm():.1e}"
        assert gradient.any() or name == "vision.mask_token", name
