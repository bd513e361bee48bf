"""Visual experts on Megatron's layers are the plain model's: loss and every gradient; a text meets none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit import AdapterConfig, CausalLM, CogViT, CogViTConfig, LanguageConfig, VisionLanguageModel
from cogvit.batch import Batch
from cogvit.config import ActivationConfig, OptimConfig, ParallelConfig, RunConfig, ZeroConfig
from cogvit.model.adapter import fitted_adapter
from cogvit.model.config import CrossModuleConfig, ExpertConfig
from cogvit.model.cross import CrossRows
from cogvit.model.eva import EvaEncoder, second_encoder
from cogvit.model.expert import is_expert, is_grown
from cogvit.model.frame import ImageFrame
from cogvit.model.image_input import ImageLimits
from cogvit.model.language_config import CrossConfig, cross_of
from cogvit.objective.blindness import Watched
from cogvit.objective.language import JointModel, JointPart, Language
from cogvit.parallel.convert import fill, plain_tensors
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.parallel.vocabulary import logits_of
from cogvit.training.engine import Engine
from tests.dist.runs import whole
from tests.packs import Shown, joint_batch
from tests.plain_vit import scramble
from tests.pool import Pool

VISION = CogViTConfig(32, 8, 3, 48, 2, 4, 2.0, use_qk_norm=False, norm_after=True)  # as EVA2-CLIP-E's
COGVLM2 = LanguageConfig("llama", 288, 64, 2, 4, 2, 16, 96, expert=ExpertConfig(1, qkv_bias=True))
SPARSE = LanguageConfig(  # with everything a family may have: biases, norms behind the branches, a tied head
    "glm4", 288, 64, 2, 4, 2, 16, 96, eps=1e-5, rotary_fraction=0.5, qkv_bias=True, proj_bias=True, mlp_bias=True,
    tied=True, expert=ExpertConfig(2),
)  # fmt: skip
ADAPTER = AdapterConfig("conv")
CROSS = CrossModuleConfig(24, 8, 32, 2, 4, 40, 32)  # of the language models that look at it
SHOWN: tuple[Shown, ...] = ("mixed", "text", "images", "mixed", "nothing", "mixed")
FROZEN: tuple[JointPart, ...] = ("language",)
NO_IMAGE: tuple[JointPart, ...] = ("language", "vision", "adapter")
EVERYTHING: tuple[JointPart, ...] = ()
Case = tuple[LanguageConfig, tuple[JointPart, ...]]


@dataclass(frozen=True)
class Row:
    """A layout with the models that are trained on it."""

    cases: tuple[Case, ...]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dp: int = 1
    memory: ActivationConfig = field(default_factory=ActivationConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    @property
    def world(self) -> int:
        return self.parallel.tp * self.parallel.pp * self.dp


@dataclass(frozen=True)
class Found:
    """What a step on the trunk gave, beside the plain model's; on rank 0."""

    loss: float
    expected_loss: float
    effect: float
    gradients: dict[str, Tensor]
    expected: dict[str, Tensor]
    text_is_the_language_models: bool


def plain_model(cfg: LanguageConfig) -> VisionLanguageModel:
    """The same weights in every process."""
    vision, adapter = CogViT(VISION), fitted_adapter(ADAPTER, VISION.embed_dim, cfg)
    frame, cross = ImageFrame(cfg.embed_dim), EvaEncoder(second_encoder(CROSS)) if cfg.cross.dim else None
    limits = ImageLimits(16, 256.0, 4096.0)
    model = VisionLanguageModel(vision, adapter, CausalLM(cfg), 3, limits, frame=frame, cross=cross)
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model


def plain_loss(model: VisionLanguageModel, micro: Sequence[Batch]) -> Tensor:
    """The weighted mean of all labels' cross entropy."""
    logits = [
        model.language.logits(model.forward_packed(batch.images, batch.sequence, looked_at(model, batch)))
        for batch in micro
    ]
    errors = [
        (F.cross_entropy(x, batch.sequence.labels, reduction="none") * batch.sequence.weight).sum()
        for x, batch in zip(logits, micro, strict=True)
    ]
    return torch.stack(errors).sum() / torch.stack([batch.sequence.weight.sum() for batch in micro]).sum()


def looked_at(model: VisionLanguageModel, batch: Batch) -> CrossRows | None:
    """What cross attention sees of a pack, image by image."""
    if model.cross is None or batch.sharp is None:
        return None
    images = batch.sharp.patches.split(CROSS.rows_per_image)
    rows = [model.cross(image.unsqueeze(0))[0] for image in images if len(image)]
    counts = [count * CROSS.rows_per_image for count in batch.sharp.count]
    return CrossRows(torch.cat([torch.zeros(0, CROSS.embed_dim), *rows]), counts)


def learns(name: str, frozen: Sequence[JointPart]) -> bool:
    return is_grown(name) or name.split(".")[0].replace("frame", "adapter") not in frozen


def start(case: Case, row: Row, mesh: Mesh) -> tuple[Engine, JointModel]:
    """The engine with the plain model's weights."""
    cfg, frozen = case
    vision = VisionStage(VISION, mesh, row.parallel, row.memory, num_tokens=96, num_slots=8)
    language = LanguageStage(cfg, mesh, row.parallel, row.memory, num_tokens=96)
    cross = second_encoder(CROSS) if cfg.cross.dim else None
    model = JointModel(vision, ADAPTER, language, frozen, cross)
    if model.cross is not None:
        model.cross.recompute = row.memory.recompute == "full"
    weights = dict(plain_model(cfg).named_parameters())
    fill(model.to(mesh.device), mesh, lambda name, shape: weights[name].detach())
    optim = OptimConfig(name="sgd", lr=0.05)
    module = CrossModuleConfig() if cross is None else CROSS
    config = RunConfig(parallel=row.parallel, zero=row.zero, optim=optim, expert=cfg.expert, cross=module)
    return Engine(model, config, mesh), model


@torch.no_grad()
def text_logits(cfg: LanguageConfig, row: Row, mesh: Mesh) -> Tensor:
    """This rank's logits of a pack of text; the language model's weights are the same whatever grows on it."""
    every = plain_model(replace(cfg, expert=COGVLM2.expert, cross=cross_of(CROSS))).language
    weights = {name: weight.detach() for name, weight in every.named_parameters()}
    stage = LanguageStage(cfg, mesh, row.parallel, row.memory, num_tokens=96)
    fill(stage.to(mesh.device), mesh, lambda name, shape: weights[name])
    batch = joint_batch(1, "text", by_place=False, framed=True)
    assert batch.sequence is not None
    cross = CrossRows(torch.zeros(0, CROSS.embed_dim), (0,) * len(batch.sequence.key)) if cfg.cross.dim else None
    return logits_of(stage(batch.sequence, None, cross), stage.head_weight)


def both_ways(rank: int, world: int, row: Row) -> list[Found]:
    """A step of each model on this layout and of the plain model."""
    mesh = start_mesh(row.parallel)
    found = []
    for cfg, frozen in row.cases:
        sharp = CROSS.rows_per_image if cfg.cross.dim else 0
        batches = [
            joint_batch(seed, shown, by_place=False, framed=True, sharp_patches=sharp)
            for seed, shown in enumerate(SHOWN)
        ]
        share = len(batches) // mesh.dp_size
        micro = batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
        engine, model = start((cfg, frozen), row, mesh)
        assert all(t.parameter.requires_grad == learns(t.name, frozen) for t in plain_tensors(model))
        evaluated = engine.evaluate(Watched(ADAPTER.spatial_pool, framed=True), micro)
        gradients = whole(engine.plain_gradients(Language(), micro), mesh)
        terms = engine.step(Language(), micro, 0).terms
        plain = plain_model(cfg)
        loss = plain_loss(plain, batches)
        loss.backward()
        assert evaluated["loss"] == pytest.approx(terms["loss"], rel=1e-6)
        expected = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in plain.named_parameters()
            if learns(name, frozen)
        }
        equal = True
        if mesh.pp_size == 1:
            bare = replace(cfg, expert=ExpertConfig(), cross=CrossConfig())
            with_experts, without = (text_logits(c, row, mesh) for c in (cfg, bare))
            equal = torch.equal(with_experts, without)
        effect = evaluated["image_effect"]
        found.append(Found(terms["loss"], float(loss.detach()), effect, gradients, expected, equal))
    return found


ROWS = {
    "one": Row(((COGVLM2, FROZEN), (SPARSE, EVERYTHING), (SPARSE, NO_IMAGE))),
    "tp2": Row(((COGVLM2, FROZEN), (SPARSE, FROZEN)), ParallelConfig(tp=2)),
    "tp2-sp": Row(((COGVLM2, FROZEN), (SPARSE, EVERYTHING)), ParallelConfig(tp=2, sequence=True)),
    "pp2": Row(((COGVLM2, FROZEN), (SPARSE, FROZEN), (SPARSE, NO_IMAGE)), ParallelConfig(pp=2)),
    "dp2-zero2": Row(((COGVLM2, FROZEN),), dp=2, zero=ZeroConfig(2, overlap=True)),
    "selective": Row(((COGVLM2, FROZEN),), memory=ActivationConfig("selective")),
    "tp2-pp2-sp-full": Row(
        ((COGVLM2, FROZEN),),
        ParallelConfig(tp=2, pp=2, sequence=True),
        memory=ActivationConfig("full", offload=True),
    ),
}
IN_CI = ("one", "dp2-zero2", "tp2-pp2-sp-full")


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=() if name in IN_CI else pytest.mark.long) for name, row in ROWS.items()]
)
def test_the_trunk_trains_the_plain_models_experts(pool: Pool, row: Row) -> None:
    for (cfg, frozen), found in zip(row.cases, pool.run(both_ways, row.world, (row,), timeout_s=220.0)[0], strict=True):
        case = f"{cfg.family} frozen {frozen}"
        assert found.loss == pytest.approx(found.expected_loss, rel=1e-6), case
        assert abs(found.effect) > 1e-3 and found.text_is_the_language_models, case
        assert found.gradients.keys() == found.expected.keys()
        assert any(map(is_expert, found.expected)), case
        for name, gradient in found.expected.items():
            error = (found.gradients[name] - gradient).norm()
            noise = 1e-6 if name.endswith("qkv.bias") else 0.0
            assert error <= 1e-5 * gradient.norm() + noise, f"{case} {name}: {error / gradient.norm():.1e}"
            # No label follows an image's tokens: of the last block they give keys and values alone.
            unread = name.startswith("language.blocks.1.expert.") and ".qkv." not in name
            assert gradient.any() or unread or name == "vision.mask_token", name
