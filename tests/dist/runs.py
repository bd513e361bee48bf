"""A tiny training run under any layout, for tests that compare layouts; imported by pool workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cogvit.batch import Batch, move
from cogvit.config import (
    ActivationConfig,
    ContrastConfig,
    MemoryConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from cogvit.model.config import AdapterConfig, CogViTConfig, TextConfig
from cogvit.model.init import init_tensor
from cogvit.model.language_config import LanguageConfig, mrope_section
from cogvit.objective.distill import Distill, DistillModel, Term
from cogvit.objective.language import JointModel, Language
from cogvit.objective.pairwise import start_groups
from cogvit.objective.siglip import Contrast, ContrastModel
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import TextStage, VisionStage
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.training.engine import Engine
from tests.packs import MASK_RATIO, joint_batch, random_batch

ADAMW_LR = 0.002
TEACHER_DIMS = {"siglip2": 24, "dinov3": 16}
TERMS = {"siglip2": Term(1.0, "smooth_l1"), "dinov3": Term(0.5, "smooth_l1")}
SUMMARY_DIMS = {"dinov3_summary": 16}
SUMMARY_TERMS = {"dinov3_summary": Term(0.7, "cosine")}
LANGUAGE = LanguageConfig("glm4", 288, 64, 4, 4, 2, 16, 96, rotary_fraction=0.5, mrope_section=mrope_section(4))
FAMILIES = {
    "reference": {},
    "cogvit_l": {"norm": "rmsnorm", "mlp": "swiglu", "position": "rotary", "use_cls_token": False},
}


@dataclass(frozen=True)
class Case:
    """One row of the parity matrix."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    sequence: bool = False
    zero: int = 1
    optimizer: Literal["sgd", "muon", "adamw"] = "sgd"
    recompute: Literal["none", "selective", "full"] = "none"
    stage: Literal["distill", "contrast", "language"] = "distill"
    family: str = "reference"
    num_micro: int = 4  # of the global batch
    loss: Literal["ring", "gather"] = "ring"
    muon_qkv: Literal["split", "heads", "fused"] = "split"
    muon_tp: Literal["gather", "sharded"] = "gather"
    overlap: bool = False
    offload: bool = False
    depth: int = 4  # 5 makes the borders between dp partitions cut matrices
    precision: Literal["fp32", "bf16"] = "fp32"
    summary: bool = False  # a loss of a teacher's summary too
    fusion: Literal["on", "off"] = "off"
    pipeline_messages: Literal["fp32", "bf16"] = "fp32"
    gradient_messages: Literal["fp32", "bf16"] = "fp32"

    @property
    def teacher_dims(self) -> dict[str, int]:
        """C of what is regressed, by name."""
        return TEACHER_DIMS | SUMMARY_DIMS if self.summary else TEACHER_DIMS

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tp * self.pp)

    def alone(self) -> Case:
        """The same run on one process."""
        return Case(
            optimizer=self.optimizer,
            stage=self.stage,
            family=self.family,
            muon_qkv=self.muon_qkv,
            num_micro=self.num_micro,
            depth=self.depth,
            summary=self.summary,
        )


@dataclass(frozen=True)
class Trace:
    """What a run did, with plain tensors under plain names."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, before clipping
    state: dict[str, Tensor]
    newton_schulz_calls: int  # over all ranks
    sent_early: int = 0  # parameters whose gradients this rank sent before the last step's backward ended


def run_config(case: Case) -> RunConfig:
    """A model of four layers with every option that parallelism could get wrong turned on."""
    return RunConfig(
        objective=case.stage,
        vision=CogViTConfig(
            image_size=32,
            patch_size=8,
            embed_dim=64,
            depth=case.depth,
            num_heads=4,
            drop_path_rate=0.3,
            layer_scale_init=0.5,
            **FAMILIES[case.family],
        ),
        text=TextConfig(embed_dim=32, depth=case.depth, num_heads=4, max_tokens=16, drop_path_rate=0.2),
        contrast=ContrastConfig(case.loss, group_ranks=int(case.loss == "ring"), chunk_pairs=5),  # divides no batch
        optim=OptimConfig(
            name=case.optimizer,
            lr=ADAMW_LR if case.optimizer == "adamw" else 0.05,
            adamw_lr=ADAMW_LR,
            clip_norm=0.5,
            muon_qkv=case.muon_qkv,
            muon_tp=case.muon_tp,
        ),
        schedule=ScheduleConfig(steps=20, warmup_steps=2),
        parallel=ParallelConfig(
            tp=case.tp, pp=case.pp, sequence=case.sequence, pipeline_messages=case.pipeline_messages
        ),
        memory=MemoryConfig(
            vision=ActivationConfig(case.recompute, recompute_blocks=1 if case.pp == 4 else 2, offload=case.offload),
            text=ActivationConfig(case.recompute, offload=case.offload),
            projection_recompute=case.recompute != "none",
        ),
        zero=ZeroConfig(case.zero, overlap=case.overlap, gradient_messages=case.gradient_messages),
        precision=case.precision,
        fusion=case.fusion,
    )


def start_engine(case: Case, mesh: Mesh) -> tuple[Engine, Distill | Contrast | Language]:
    """The engine with weights that depend on names alone, scaled up so that gradients are not tiny."""
    config = run_config(case)
    vision = VisionStage(
        config.vision, mesh, config.parallel, config.memory.vision, num_tokens=96, num_slots=8, fusion=config.fusion
    )
    model: torch.nn.Module
    objective: Distill | Contrast | Language
    if case.stage == "distill":
        model = DistillModel(vision, case.teacher_dims, recompute=config.memory.projection_recompute)
        objective = Distill(TERMS | SUMMARY_TERMS if case.summary else TERMS, MASK_RATIO)
    elif case.stage == "language":
        language = LanguageStage(
            LANGUAGE, mesh, config.parallel, config.memory.language, num_tokens=96, fusion=config.fusion
        )
        model, objective = JointModel(vision, AdapterConfig("glm"), language), Language()
    else:
        text = TextStage(config.text, mesh, config.parallel, config.memory.text, num_tokens=80, fusion=config.fusion)
        model, objective = (
            ContrastModel(vision, text, 32, recompute=config.memory.projection_recompute),
            Contrast(config.contrast, start_groups(config.contrast, config.data.global_batch_images, mesh)),
        )

    def weights(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in ("log_t", "bias"):
            return torch.full(shape, {"log_t": 1.5, "bias": -3.0}[name])
        tensor = init_tensor(name, shape, 3, 0.5)
        # Gradients that are not tiny; a language model's are not, and rounding would grow a million times in 20 steps.
        return tensor * 5.0 if len(shape) == 2 and not name.startswith("language.") else tensor

    fill(model.to(mesh.device), mesh, weights)
    return Engine(model, config, mesh), objective


def micro_of(case: Case, mesh: Mesh) -> tuple[Batch, ...]:
    """This rank's share of the global batch, which is the same for every layout."""
    share = case.num_micro // mesh.dp_size
    seeds = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
    if case.stage == "language":
        return tuple(move(joint_batch(seed, "mixed", by_place=True), mesh.device) for seed in seeds)
    return tuple(move(random_batch(seed, case.teacher_dims), mesh.device) for seed in seeds)


def train(rank: int, world: int, case: Case, steps: int) -> Trace:
    """Run on this worker; rank 0 returns the whole state."""
    mesh = start_mesh(run_config(case).parallel)
    engine, objective = start_engine(case, mesh)
    gradients = whole(engine.plain_gradients(objective, micro_of(case, mesh)), mesh)
    losses, norms = [], []
    for step in range(steps):
        report = engine.step(objective, micro_of(case, mesh), step)
        losses.append(report.terms["loss"])
        norms.append(report.grad_norm)
    calls = mesh.all_reduce(torch.tensor([engine.zero.inner.newton_schulz_calls]))
    early = engine.zero.early
    sent = 0 if early is None else len(early.sent)
    return Trace(losses, norms, gradients, whole_state(engine, mesh), int(calls), sent)


def whole_state(engine: Engine, mesh: Mesh) -> dict[str, Tensor]:
    """Weights and moments of all pipeline stages."""
    return whole(engine.plain_state(), mesh)


def whole(named: Iterable[tuple[str, Tensor]], mesh: Mesh) -> dict[str, Tensor]:
    """Put together what the pipeline stages yield."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(mesh.world_size)]
    dist.all_gather_object(parts, {key: tensor.detach().cpu().clone() for key, tensor in named})
    return {key: tensor for part in parts for key, tensor in part.items()}
