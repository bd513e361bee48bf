"""Heads for more tokens on Megatron's layers are the plain model's: every depth's loss and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cogvit import AdapterConfig, CausalLM, CogViT, CogViTConfig, LanguageConfig, MmtpConfig, VisionLanguageModel
from cogvit.batch import Batch
from cogvit.config import ActivationConfig, OptimConfig, ParallelConfig, RunConfig
from cogvit.model.adapter import fitted_adapter
from cogvit.model.config import SEEN_AT_IMAGES
from cogvit.model.image_input import ImageLimits
from cogvit.model.language_config import mrope_section
from cogvit.model.sequence import tokens_ahead
from cogvit.objective.language import JointModel, Language
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.language import LanguageStage
from cogvit.parallel.mesh import Mesh, start_mesh
from cogvit.training.engine import Engine
from tests.dist.runs import whole
from tests.packs import Shown, joint_batch
from tests.plain_vit import scramble
from tests.pool import Pool

VISION = CogViTConfig(32, 8, 3, 48, 2, 4, 2.0, eps=1e-5, norm="rmsnorm", mlp="swiglu", use_cls_token=False)
GLM4 = LanguageConfig("glm4", 288, 64, 2, 4, 2, 16, 96, eps=1e-5, rotary_fraction=0.5, mrope_section=mrope_section(4))
LLAMA = LanguageConfig("llama", 288, 64, 2, 4, 2, 16, 96, tied=True)
ADAPTER = AdapterConfig("glm", 80)
SHOWN: tuple[Shown, ...] = ("mixed", "text", "nothing", "mixed")


@dataclass(frozen=True)
class Row:
    """A layout with the heads that are trained on it."""

    parallel: ParallelConfig
    dp: int
    memory: ActivationConfig
    heads: tuple[tuple[LanguageConfig, MmtpConfig], ...]

    @property
    def world(self) -> int:
        return self.parallel.tp * self.parallel.pp * self.dp


def plain_model(cfg: LanguageConfig) -> VisionLanguageModel:
    """The same weights in every process."""
    adapter = fitted_adapter(ADAPTER, VISION.embed_dim, cfg)
    model = VisionLanguageModel(CogViT(VISION), adapter, CausalLM(cfg), 3, ImageLimits(16, 256.0, 4096.0))
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model


def batches_of(cfg: LanguageConfig) -> list[Batch]:
    batches = []
    for seed, shown in enumerate(SHOWN):
        batch = joint_batch(seed, shown, by_place=cfg.family == "glm4")
        sizes = [-(-rows // 2) * -(-columns // 2) for rows, columns in batch.images.grid_hw.tolist() if rows]
        assert batch.sequence is not None
        ahead = tokens_ahead(batch.sequence, cfg.mmtp, sizes) if cfg.mmtp.depths else None
        batches.append(replace(batch, sequence=replace(batch.sequence, ahead=ahead)))
    return batches


def plain_losses(model: VisionLanguageModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Of the next token and of each depth, over all packs."""
    sums: list[list[Tensor]] = []
    weights: list[list[Tensor]] = []
    for batch in batches:
        sequence, visual = batch.sequence, model.encode_images(batch.images)
        assert sequence is not None and sequence.ahead is not None
        hidden = model.language.forward_packed(sequence, visual)
        outputs = [hidden, *model.language.forward_ahead(hidden, sequence, sequence.ahead, visual)]
        labels, counted = ([own, *ahead] for own, ahead in zip(
            (sequence.labels, sequence.weight), sequence.ahead_labels(), strict=True
        ))  # fmt: skip
        sums.append([
            (F.cross_entropy(model.language.logits(x), label, reduction="none") * weight).sum()
            for x, label, weight in zip(outputs, labels, counted, strict=True)
        ])  # fmt: skip
        weights.append([weight.sum() for weight in counted])
    totals = zip(zip(*sums, strict=True), zip(*weights, strict=True), strict=True)
    return [torch.stack(loss).sum() / torch.stack(weight).sum() for loss, weight in totals]


def start(cfg: LanguageConfig, row: Row, mesh: Mesh) -> Engine:
    config = RunConfig(parallel=row.parallel, optim=OptimConfig(name="sgd", lr=0.05))
    vision = VisionStage(VISION, mesh, row.parallel, row.memory, num_tokens=96, num_slots=8)
    language = LanguageStage(cfg, mesh, row.parallel, row.memory, num_tokens=96)
    model = JointModel(vision, ADAPTER, language)
    weights = dict(plain_model(cfg).named_parameters())
    fill(model.to(mesh.device), mesh, lambda name, shape: weights[name].detach())
    return Engine(model, config, mesh)


Compared = tuple[dict[str, float], list[float], dict[str, Tensor], dict[str, Tensor]]


def both_ways(rank: int, world: int, row: Row) -> list[Compared]:
    """Terms of the trunk, losses of the plain model, and the gradients of both."""
    mesh, found = start_mesh(row.parallel), []
    for family, mmtp in row.heads:
        cfg = replace(family, mmtp=mmtp)
        batches = batches_of(cfg)
        share = len(batches) // mesh.dp_size
        micro = batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
        engine = start(cfg, row, mesh)
        evaluated = engine.evaluate(Language(), micro)
        gradients = whole(engine.plain_gradients(Language(), micro), mesh)
        terms = engine.step(Language(), micro, 0).terms
        assert {name: terms[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-6)
        plain = plain_model(cfg)
        losses = plain_losses(plain, batches)
        (losses[0] + mmtp.weight * torch.stack(losses[1:]).mean()).backward()
        expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
        found.append((terms, [float(loss.detach()) for loss in losses], gradients, expected))
    return found


EVERY = tuple((GLM4, MmtpConfig(3, images=images, tokens=3)) for images in SEEN_AT_IMAGES)
UNSHARED = (LLAMA, MmtpConfig(2, share=False, images="tokens", weight=0.7))
STOPPED = (GLM4, MmtpConfig(2, trunk_gradient=False))
ROWS = {
    "one": Row(ParallelConfig(), 1, ActivationConfig(), (*EVERY, UNSHARED, STOPPED)),
    "pp2": Row(ParallelConfig(pp=2), 1, ActivationConfig(), (*EVERY, UNSHARED)),
    "tp2-sp": Row(ParallelConfig(tp=2, sequence=True), 1, ActivationConfig("full"), (*EVERY, UNSHARED)),
    "dp2": Row(ParallelConfig(), 2, ActivationConfig("selective"), (EVERY[0], EVERY[1], EVERY[4], UNSHARED)),
    "tp2-pp2": Row(ParallelConfig(tp=2, pp=2), 1, ActivationConfig(), (EVERY[0], UNSHARED)),
}


IN_CI = ("one", "tp2-pp2")


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=() if name in IN_CI else pytest.mark.long) for name, row in ROWS.items()]
)
def test_every_depth_trains_as_in_the_plain_model(pool: Pool, row: Row) -> None:
    for (_, mmtp), (terms, losses, gradients, expected) in zip(
        row.heads, pool.run(both_ways, row.world, (row,), timeout_s=220.0)[0], strict=True
    ):
        names = ["loss", *(f"loss_mtp_{depth}" for depth in range(1, mmtp.depths + 1))]
        assert [terms[name] for name in names] == pytest.approx(losses, rel=1e-6), mmtp
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (gradients[name] - gradient).norm()
            noise = 1e-6 if name.endswith(("k_norm.bias", "qkv.bias")) else 0.0
            assert error <= 1e-5 * gradient.norm() + noise, f"{mmtp} {name}: {error / gradient.norm():.1e}"
            assert gradient.any() or name == "vision.mask_token", (mmtp, name)


def bytes_between_stages(rank: int, world: int, mmtp: MmtpConfig) -> int:
    """What this rank sends in a step, by the sizes of its messages to other stages."""
    row = Row(ParallelConfig(pp=2), 1, ActivationConfig(), ())
    mesh, cfg, sent = start_mesh(row.parallel), replace(GLM4, mmtp=mmtp), [0]
    engine, real = start(cfg, row, mesh), {"send": dist.send, "isend": dist.isend, "batch": dist.batch_isend_irecv}

    def count(tensor: Tensor) -> None:
        sent[0] += tensor.numel() * tensor.element_size()

    def send(tensor: Tensor, *args: object, **kwargs: object) -> object:
        count(tensor)
        return real["send"](tensor, *args, **kwargs)  # type: ignore[operator]

    def batch(operations: list[dist.P2POp]) -> object:
        for operation in operations:
            if operation.op is dist.isend:
                count(operation.tensor)
        return real["batch"](operations)  # type: ignore[operator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "send", send)
        patch.setattr(torch.distributed, "batch_isend_irecv", batch)
        engine.step(Language(), batches_of(cfg), 0)
    return sent[0]


def test_heads_add_no_bytes_between_stages_but_the_embedding(pool: Pool) -> None:
    """Once a step the first stage lends its embedding to the last and gets a gradient back, whatever the packs hold."""
    without = pool.run(bytes_between_stages, 2, (MmtpConfig(),))
    embedding = GLM4.vocab_size * GLM4.embed_dim * 4
    for images in SEEN_AT_IMAGES:
        found = pool.run(bytes_between_stages, 2, (MmtpConfig(3, images=images),))
        assert [more - less for more, less in zip(found, without, strict=True)] == [embedding, embedding], images
