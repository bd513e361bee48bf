"""Stage 3 on Megatron's layers is the plain vision-language model: logits, loss and every gradient, in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cogvit import AdapterConfig, CausalLM, CogViT, CogViTConfig, LanguageConfig, VisionLanguageModel
from cogvit.batch import Batch
from cogvit.config import ActivationConfig, OptimConfig, ParallelConfig, RunConfig, ZeroConfig
from cogvit.errors import ConfigError
from cogvit.model.adapter import fitted_adapter
from cogvit.model.image_input import ImageLimits
from cogvit.model.language_config import check_layout, mrope_section
from cogvit.objective.language import JointModel, JointPart, Language
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.parallel.vocabulary import logits_of
from cogvit.training.engine import Engine
from tests.dist.runs import whole
from tests.packs import Shown, joint_batch
from tests.plain_vit import scramble
from tests.pool import Pool

VISION = CogViTConfig(32, 8, 3, 48, 2, 4, 2.0, eps=1e-5, norm="rmsnorm", mlp="swiglu", use_cls_token=False)
LANGUAGES = {
    "llama": LanguageConfig("llama", 288, 64, 2, 4, 2, 16, 96, qkv_bias=True, proj_bias=True, mlp_bias=True, tied=True),
    "glm4": LanguageConfig(
        "glm4", 288, 64, 2, 4, 2, 16, 96, eps=1e-5, rotary_fraction=0.5, mrope_section=mrope_section(4)
    ),
    "glm": LanguageConfig("glm", 288, 64, 2, 4, 2, 16, 96, eps=1e-5, rotary_fraction=0.5, qkv_bias=True),
    "qwen3": LanguageConfig("qwen3", 288, 64, 2, 8, 2, 24, 96, qkv_bias=True),
}
ADAPTERS = {
    "llama": AdapterConfig("mlp"),
    "glm4": AdapterConfig("glm", 80),
    "glm": AdapterConfig("wide_conv"),
    "qwen3": AdapterConfig("conv"),
}
SHOWN: tuple[Shown, ...] = ("mixed", "text", "images", "mixed", "nothing", "mixed")


@dataclass(frozen=True)
class Layout:
    """How a step is run; the numbers are the same."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence: bool = False
    zero: int = 1
    overlap: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False

    def __str__(self) -> str:
        flags = ["sp"] * self.sequence + [self.recompute] * (self.recompute != "none") + ["offload"] * self.offload
        return "-".join([f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", f"zero{self.zero}", *flags])


@dataclass(frozen=True)
class Found:
    """What a step on the trunk gave, beside the plain model's; on rank 0."""

    loss: float
    evaluated: float
    expected_loss: float
    gradients: dict[str, Tensor]
    expected: dict[str, Tensor]
    logits_error: float  # of the mixed pack, of its largest logit
    blind_logits_equal: bool  # of a pack of text alone, with the tower and without it


def plain_model(family: str) -> VisionLanguageModel:
    """The same weights in every process."""
    cfg = LANGUAGES[family]
    adapter = fitted_adapter(ADAPTERS[family], VISION.embed_dim, cfg)
    model = VisionLanguageModel(CogViT(VISION), adapter, CausalLM(cfg), 3, ImageLimits(16, 256.0, 4096.0))
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model


def logits_and_loss(model: VisionLanguageModel, micro: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Logits of the first pack, and the weighted mean of all labels' cross entropy."""
    logits = [model.language.logits(model.forward_packed(batch.images, batch.sequence)) for batch in micro]
    errors = [
        (F.cross_entropy(x, batch.sequence.labels, reduction="none") * batch.sequence.weight).sum()
        for x, batch in zip(logits, micro, strict=True)
    ]
    weights = [batch.sequence.weight.sum() for batch in micro]
    return logits[0].detach(), torch.stack(errors).sum() / torch.stack(weights).sum()


def run_config(layout: Layout) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(tp=layout.tp, pp=layout.pp, sequence=layout.sequence),
        zero=ZeroConfig(layout.zero, overlap=layout.overlap),
        optim=OptimConfig(name="sgd", lr=0.05),
    )


def start(
    family: str, layout: Layout, frozen: Sequence[JointPart], mesh: Mesh, config: RunConfig
) -> tuple[Engine, JointModel]:
    """The engine with the plain model's weights."""
    memory = ActivationConfig(layout.recompute, offload=layout.offload)
    vision = VisionStage(VISION, mesh, config.parallel, memory, num_tokens=96, num_slots=8)
    language = LanguageStage(LANGUAGES[family], mesh, config.parallel, memory, num_tokens=96)
    model = JointModel(vision, ADAPTERS[family], language, frozen)
    weights = dict(plain_model(family).named_parameters())
    fill(model.to(mesh.device), mesh, lambda name, shape: weights[name].detach())
    return Engine(model, config, mesh), model


@torch.no_grad()
def trunk_logits(engine: Engine, model: JointModel, batch: Batch, see: bool) -> Tensor | None:
    """Whole logits of one pack on the last stage, with one stage where the tower is asked."""
    mesh = engine.mesh
    visual = model.visual(model.features(batch), batch) if see else None

    def forward(index: int) -> Tensor:
        hidden = model.language(batch.sequence, visual)
        if not mesh.is_last_stage:
            return hidden
        shard = logits_of(hidden, model.language.head_weight)
        shards = [torch.empty_like(shard) for _ in range(mesh.tp_size)]
        dist.all_gather(shards, shard, group=mesh.tp_group)
        return torch.cat(shards, dim=1)

    with model.language.lent_embedding(train=False):
        found = engine.schedule.forward_only(model.language.trunk, forward, 1, lambda out, index: out)
    return found[0] if found else None


def both_ways(rank: int, world: int, layout: Layout, cases: Sequence[tuple[str, tuple[JointPart, ...]]]) -> list[Found]:
    """A step of each model on this layout and of the plain model."""
    mesh = start_mesh(run_config(layout).parallel)
    found = []
    for family, frozen in cases:
        batches = [joint_batch(seed, shown, by_place=family == "glm4") for seed, shown in enumerate(SHOWN)]
        share = len(batches) // mesh.dp_size
        micro = batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
        engine, model = start(family, layout, frozen, mesh, run_config(layout))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(name.split(".")[0] in frozen for name in names)
        evaluated = engine.evaluate(Language(), micro)["loss"]
        gradients = whole(engine.plain_gradients(Language(), micro), mesh)
        terms = engine.step(Language(), micro, 0).terms
        assert terms["answer_tokens"] == sum(int((batch.sequence.weight > 0).sum()) for batch in batches)
        assert all(p.grad is None for name, p in model.named_parameters() if name.split(".")[0] in frozen)
        plain = plain_model(family)
        logits, loss = logits_and_loss(plain, batches)
        loss.backward()
        expected = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in plain.named_parameters()
            if name.split(".")[0] not in frozen
        }
        error, equal = 0.0, True
        if mesh.pp_size == 1:
            engine, model = start(family, layout, frozen, mesh, run_config(layout))
            valid = int(batches[0].sequence.cu_seqlens[-2])
            error = float((trunk_logits(engine, model, batches[0], True) - logits)[:valid].abs().max() / logits.max())
            seeing, blind = (trunk_logits(engine, model, batches[1], see) for see in (True, False))
            equal = torch.equal(seeing, blind)
        found.append(Found(terms["loss"], evaluated, float(loss.detach()), gradients, expected, error, equal))
    return found


EVERYTHING: tuple[JointPart, ...] = ()
ROWS: list[tuple[Layout, list[tuple[str, tuple[JointPart, ...]]]]] = [
    (Layout(), [(family, EVERYTHING) for family in LANGUAGES]),
    (Layout(tp=2), [("llama", EVERYTHING), ("glm4", ("vision",)), ("qwen3", EVERYTHING)]),
    (
        Layout(tp=2, sequence=True),
        [("llama", EVERYTHING), ("glm", EVERYTHING), ("glm4", EVERYTHING), ("qwen3", ("language",))],
    ),
    (
        Layout(pp=2),
        [
            ("llama", EVERYTHING),
            ("glm4", ("vision",)),
            ("qwen3", ("language",)),
            ("llama", ("vision", "language")),
            ("llama", ("vision", "adapter")),
        ],
    ),
    (Layout(dp=2), [("llama", ("adapter",)), ("glm4", EVERYTHING)]),
    (Layout(dp=2, zero=2, overlap=True), [("qwen3", EVERYTHING), ("glm4", ("language", "vision"))]),
    (Layout(recompute="full", offload=True), [("glm4", EVERYTHING), ("qwen3", ("vision",))]),
    (Layout(recompute="selective"), [("llama", EVERYTHING), ("qwen3", ("language",))]),
    (Layout(tp=2, pp=2, sequence=True, recompute="full"), [("llama", EVERYTHING), ("glm4", ("adapter",))]),
]


IN_CI = (Layout(), Layout(dp=2, zero=2, overlap=True), Layout(tp=2, pp=2, sequence=True, recompute="full"))


@pytest.mark.parametrize(
    ("layout", "cases"),
    [pytest.param(*row, marks=() if row[0] in IN_CI else pytest.mark.long, id=str(row[0])) for row in ROWS],
)
def test_the_trunk_trains_the_plain_model(
    pool: Pool, layout: Layout, cases: list[tuple[str, tuple[JointPart, ...]]]
) -> None:
    world = layout.tp * layout.pp * layout.dp
    for (family, frozen), found in zip(
        cases, pool.run(both_ways, world, (layout, cases), timeout_s=220.0)[0], strict=True
    ):
        assert found.loss == pytest.approx(found.expected_loss, rel=1e-6), (family, frozen)
        assert found.evaluated == pytest.approx(found.expected_loss, rel=1e-6), (family, frozen)
        assert found.logits_error < 1e-5 and found.blind_logits_equal, (family, frozen)
        assert found.gradients.keys() == found.expected.keys()
        for name, gradient in found.expected.items():
            error = (found.gradients[name] - gradient).norm()
            noise = 1e-6 if name.endswith(("k_norm.bias", "qkv.bias")) else 0.0
            assert error <= 1e-5 * gradient.norm() + noise, f"{family} {name}: {error / gradient.norm():.1e}"
            assert gradient.any() or name == "vision.mask_token", name


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (4, 1, r"--parallel\.tp 4 does not divide the language model's num_kv_heads=2"),
        (1, 3, r"--parallel\.pp 3 does not divide the language model's depth=2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tp: int, pp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(LANGUAGES["glm4"], tp, pp)


def state_after_step(rank: int, world: int, layout: Layout, family: str) -> tuple[dict[str, Tensor], int]:
    """Weights after a step of Muon, and how many matrices were made orthogonal."""
    mesh = start_mesh(run_config(layout).parallel)
    config = replace(run_config(layout), optim=OptimConfig(lr=0.02, adamw_lr=1e-3))
    engine, _ = start(family, layout, (), mesh, config)
    batches = [joint_batch(seed, shown, by_place=False) for seed, shown in enumerate(SHOWN)]
    share = len(batches) // mesh.dp_size
    engine.step(Language(), batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share], 0)
    calls = mesh.all_reduce(torch.tensor([engine.zero.inner.newton_schulz_calls]))
    return {name: x for name, x in whole(engine.plain_state(), mesh).items() if name.startswith("master")}, int(calls)


def test_muon_updates_grouped_heads_as_on_one_process(pool: Pool) -> None:
    expected, calls = pool.run(state_after_step, 1, (Layout(), "qwen3"))[0]
    actual, _ = pool.run(state_after_step, 4, (Layout(tp=2, dp=2), "qwen3"))[0]
    assert calls == 2 * 2 * 6  # of two blocks in each model: q, k, v, projection and the MLP's two
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def rounded_and_exact(rank: int, world: int, layout: Layout, family: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients under bf16 autocast, and in fp32."""
    mesh = start_mesh(run_config(layout).parallel)
    batches = [joint_batch(seed, shown, by_place=family == "glm4") for seed, shown in enumerate(SHOWN)]
    found = []
    for precision in ("bf16", "fp32"):
        engine, _ = start(family, layout, (), mesh, replace(run_config(layout), precision=precision))
        gradients = whole(engine.plain_gradients(Language(), batches), mesh)
        found.append((engine.evaluate(Language(), batches)["loss"], gradients))
    return found


@pytest.mark.parametrize(
    ("layout", "family"),
    [(Layout(tp=2, sequence=True), "glm4"), pytest.param(Layout(pp=2), "qwen3", marks=pytest.mark.long)],
)
def test_bf16_gradients_are_those_of_fp32(pool: Pool, layout: Layout, family: str) -> None:
    (loss, rounded), (expected_loss, exact) = pool.run(rounded_and_exact, 2, (layout, family))[0]
    assert loss == pytest.approx(expected_loss, rel=3e-3) and loss != expected_loss
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        error = float((rounded[name] - gradient).norm())
        assert error <= 0.08 * float(gradient.norm()) + 1e-6, f"{name}: {error / float(gradient.norm()):.3f}"
